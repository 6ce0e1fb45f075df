"""Middleware for all requests: checks the key and whether the server is draining, and logs the request."""

from __future__ import annotations

import time
import uuid
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from milora.serving.errors import ApiError
from milora.serving.logs import log
from milora.serving.service import Service
from milora.serving.tenants import Tenant

OPEN_PATHS = ("/health", "/version", "/openapi.json")
"""Paths that need no key, as they contain no data of a tenant."""

ROUTES = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/models",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/health",
    "/metrics",
    "/version",
)
DRAINING_RETRY_SECONDS = 5
_NOBODY = Tenant("")


class Gate:
    """ASGI middleware.

    It sets three values in `scope["state"]`: `tenant`; `arrived`, in seconds of `time.monotonic()`; and `notes`, to
    which the request's handler adds fields for the log. The note `status` replaces the response's status in logs and
    metrics if a request fails after its status was sent.

    Args:
        app: The wrapped application.
        service: The server's components.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived, path, status = time.monotonic(), scope["path"], 500
        identity = uuid.uuid4().hex
        notes: dict[str, Any] = {}
        tenant = self._service.tenants.of(_authorization(scope))
        scope.setdefault("state", {}).update(tenant=tenant or _NOBODY, arrived=arrived, notes=notes)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", identity.encode())]
            await send(message)

        try:
            if refusal := self._refusal(path, tenant):
                await refusal.response()(scope, receive, answer)
            else:
                await self._app(scope, _limited(receive, self._service.settings.body_bytes), answer)
        finally:
            seconds = time.monotonic() - arrived
            status = notes.pop("status", status)
            name = "" if tenant is None else tenant.name
            route = path if path in ROUTES else "other"
            self._service.metrics.requests.labels(name, route, str(status)).inc()
            if route.startswith("/v1/"):
                self._service.metrics.request_seconds.labels(name).observe(seconds)
            if route not in ("/health", "/metrics"):
                log(
                    "request",
                    id=identity,
                    tenant=name,
                    method=scope["method"],
                    route=route,
                    status=status,
                    seconds=round(seconds, 4),
                    **notes,
                )

    def _refusal(self, path: str, tenant: Tenant | None) -> ApiError | None:
        if path in OPEN_PATHS:
            return None
        if tenant is None:
            return ApiError(
                401, "There is no such API key: send a header `Authorization: Bearer KEY`.", "invalid_api_key"
            )
        if path == "/metrics":
            if tenant.reads_metrics:
                return None
            return ApiError(403, "This key may not read metrics: it needs `metrics: true`.", "permission_denied")
        if self._service.is_draining and path.startswith("/v1/"):
            return ApiError(
                503,
                "The server is about to stop: send the request to another one.",
                "draining",
                retry_after=DRAINING_RETRY_SECONDS,
            )
        return None


def _authorization(scope: Scope) -> str | None:
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    return values[0].decode("latin-1") if len(values) == 1 else None


def _limited(receive: Receive, most: int) -> Receive:
    """Wraps `receive` and rejects a body larger than `most` bytes with status 413."""
    read = 0

    async def limited() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > most:
            raise HTTPException(413)
        return message

    return limited
