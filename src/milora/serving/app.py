"""The HTTP application: OpenAI's routes, vLLM's for adapters, health and metrics."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from milora.serving.answers import TokenTexts
from milora.serving.connection import CLIENT_GONE, ClientGoneError, EventStream, unless_gone
from milora.serving.errors import ApiError, validation_error
from milora.serving.exchange import Exchange
from milora.serving.gate import Gate
from milora.serving.logs import log
from milora.serving.protocol import ChatBody, CompletionBody, LoadBody, UnloadBody
from milora.serving.requests import AdapterError
from milora.serving.service import Service, no_such_model
from milora.serving.tenants import Tenant
from milora_core.errors import MiLoraError

DONE = b"data: [DONE]\n\n"

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": what,
        "content": {"application/json": {"schema": {"type": "object", "required": ["error"]}}},
    }
    for status, what in {
        400: "The request is wrong",
        401: "There is no such key",
        403: "The key may not do this",
        404: "There is no such model for this key",
        409: "The adapter is in use, or its name is taken",
        413: "The body is too large",
        429: "Too many requests",
        500: "The adapter gave NaN or infinity",
        503: "The request waited too long, or the server is draining",
    }.items()
}


_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


def build_app(service: Service) -> FastAPI:
    """Builds the HTTP application of a server.

    Args:
        service: The server's components.
    """
    app = FastAPI(
        title="milora serve",
        version=version("milora"),
        redoc_url=None,
        docs_url=None,
        redirect_slashes=False,
        responses=_ERRORS,
    )
    app.add_middleware(Gate, service=service)
    _add_error_handlers(app)
    bearer = [Depends(HTTPBearer(auto_error=False))]

    @app.post("/v1/completions", dependencies=bearer, responses=_STREAM)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continues prompts."""
        return await _generate(service, body, request)

    @app.post("/v1/chat/completions", dependencies=bearer, responses=_STREAM)
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answers a chat."""
        return await _generate(service, body, request)

    @app.get("/v1/models", dependencies=bearer)
    async def models(request: Request) -> dict[str, Any]:
        """The backbone and the adapters that the key may use."""
        return {"object": "list", "data": _models(service, request.state.tenant)}

    @app.get("/v1/models/{model}", dependencies=bearer)
    async def one_model(model: str, request: Request) -> dict[str, Any]:
        """One model, if the key may use it."""
        for card in _models(service, request.state.tenant):
            if card["id"] == model:
                return card
        raise no_such_model(model)

    @app.post("/v1/load_lora_adapter", dependencies=bearer, response_class=PlainTextResponse)
    async def load_lora_adapter(body: LoadBody, request: Request) -> PlainTextResponse:
        """Loads an adapter; needs the admin key."""
        _require_admin(service, request)
        await service.load_adapter(body.lora_name, body.lora_path, replace=body.load_inplace)
        request.state.notes["adapter"] = body.lora_name
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter", dependencies=bearer, response_class=PlainTextResponse)
    async def unload_lora_adapter(body: UnloadBody, request: Request) -> PlainTextResponse:
        """Unloads an adapter; needs the admin key."""
        _require_admin(service, request)
        await service.unload_adapter(body.lora_name)
        request.state.notes["adapter"] = body.lora_name
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @app.get("/health")
    async def health() -> JSONResponse:
        """Status 200 if the server accepts requests."""
        if service.is_draining:
            return JSONResponse({"status": "draining"}, 503)
        if service.engine.healthy() is not None:
            return JSONResponse({"status": "failed"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", dependencies=bearer, response_class=PlainTextResponse)
    def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version")
    async def server_version() -> dict[str, str]:
        """The version of milora."""
        return {"version": version("milora")}

    return app


async def _generate(service: Service, body: CompletionBody | ChatBody, request: Request) -> Response:
    tenant, notes = request.state.tenant, request.state.notes
    exchange: Exchange | None = None
    events: AsyncGenerator[Any, None] | None = None
    is_handed_on = False
    try:
        exchange = await service.begin(body, tenant, request.state.arrived)
        # Only now `body.model` is known to name a model, so it may be logged.
        notes.update(model=body.model, stream=body.stream)
        events = exchange.events()
        if not body.stream:
            answer = await unless_gone(request.receive, _whole(exchange, events))
            return JSONResponse(answer)
        # Errors before the first event are HTTP errors; later ones are events of the stream.
        first = await unless_gone(request.receive, anext(events))
        chunks = _chunks(exchange, events, first, with_usage=_wants_usage(body), notes=notes)
        is_handed_on = True
        return EventStream(chunks, service.settings.stall_seconds, partial(_end_stream, exchange, notes))
    except ClientGoneError:
        notes["status"] = CLIENT_GONE
        return Response(status_code=CLIENT_GONE)
    except AdapterError as error:
        raise _failure(error) from error
    finally:
        if not is_handed_on:
            if events is not None:
                await events.aclose()
            if exchange is not None:
                _close(exchange, notes)


def _failure(error: MiLoraError) -> ApiError:
    if isinstance(error, AdapterError):
        log("adapter_unavailable", level=40, reason=str(error))
    return ApiError.of_generation(error)


async def _whole(exchange: Exchange, events: AsyncGenerator[Any, None]) -> dict[str, Any]:
    async for _ in events:
        pass
    logprobs = [each for text in exchange.texts for each in text.logprobs]
    texts = await _texts_of(exchange, logprobs)
    return exchange.form.whole(exchange.texts, exchange.usage, texts)


async def _chunks(
    exchange: Exchange,
    events: AsyncGenerator[Any, None],
    first: Any,
    *,
    with_usage: bool,
    notes: dict[str, Any],
) -> AsyncGenerator[bytes, None]:
    shown = [0] * len(exchange.texts)
    begun: set[int] = set()
    try:
        item = first
        while item is not None:
            text, event = item
            token_texts = await _texts_of(exchange, event.logprobs or ())
            is_first = text.index not in begun
            chunk = exchange.form.chunk(text, event, shown[text.index], token_texts, is_first=is_first)
            shown[text.index] += len(event.text)
            if chunk is not None:
                begun.add(text.index)
                yield _event({**chunk, "usage": None} if with_usage else chunk)
            item = await anext(events, None)
        if with_usage:
            yield _event(exchange.form.last(exchange.usage))
    except MiLoraError as error:
        failure = _failure(error)
        notes.update(status=failure.status, code=failure.code)
        yield _event(failure.body())
    finally:
        await events.aclose()
    yield DONE


def _end_stream(exchange: Exchange, notes: dict[str, Any], is_gone: bool) -> None:
    if is_gone:
        notes.setdefault("status", CLIENT_GONE)
    _close(exchange, notes)


async def _texts_of(exchange: Exchange, logprobs: Any) -> TokenTexts:
    """A function for the texts of the tokens in log-probabilities."""
    if not exchange.form.with_logprobs:
        return lambda tokens: []
    needed = [token for each in logprobs for token in (each.token, *(other for other, _ in each.top))]
    texts = await exchange.token_texts(needed)
    return lambda tokens: [texts[token] for token in tokens]


def _close(exchange: Exchange, notes: dict[str, Any]) -> None:
    exchange.close()
    notes.update(
        prompt_tokens=exchange.usage.prompt_tokens,
        completion_tokens=exchange.usage.completion_tokens,
        cached_tokens=exchange.usage.cached_tokens,
        first_token_seconds=None if exchange.first_token_seconds is None else round(exchange.first_token_seconds, 4),
        finish_reasons=[text.finish_reason for text in exchange.texts],
    )


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"


def _wants_usage(body: CompletionBody | ChatBody) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


def _models(service: Service, tenant: Tenant) -> list[dict[str, Any]]:
    backbone, length = service.settings.model, service.max_model_len

    def card(name: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "milora",
            "parent": parent,
            "max_model_len": length,
        }

    own = [card(backbone, None)] if tenant.backbone else []
    return [*own, *(card(each.name, backbone) for each in service.visible_adapters(tenant))]


def _require_admin(service: Service, request: Request) -> None:
    if request.state.tenant.is_admin:
        return
    fix = "use the admin key" if service.tenants.has_admin else "start the server with --admin-key-file"
    raise ApiError(403, f"Only the admin key loads and unloads adapters: {fix}.", "permission_denied")


def _add_error_handlers(app: FastAPI) -> None:
    def handler(to_error: Callable[[Any], ApiError]) -> Callable[[Request, Any], Awaitable[Response]]:
        async def handle(request: Request, error: Any) -> Response:
            found = to_error(error)
            request.state.notes["code"] = found.code
            return found.response()

        return handle

    app.add_exception_handler(ApiError, handler(lambda error: error))
    app.add_exception_handler(MiLoraError, handler(ApiError.of))
    app.add_exception_handler(RequestValidationError, handler(_of_validation))
    app.add_exception_handler(HTTPException, handler(_of_framework))

    async def unexpected(request: Request, error: Exception) -> Response:
        log("request_failed", level=40, error=error)
        return ApiError(500, "The server failed; its log has the place.", "internal_error").response()

    app.add_exception_handler(Exception, unexpected)


def _of_validation(error: RequestValidationError) -> ApiError:
    return validation_error(error.errors(), error.body)


def _of_framework(error: HTTPException) -> ApiError:
    messages = {404: "There is no such route.", 405: "This route takes another method.", 413: "The body is too large."}
    codes = {404: "no_such_route", 405: "method_not_allowed", 413: "body_too_large"}
    status = error.status_code
    allow = (error.headers or {}).get("Allow")
    return ApiError(status, messages.get(status, str(error.detail)), codes.get(status, "invalid_request"), allow=allow)
