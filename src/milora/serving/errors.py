"""Errors in OpenAI's format: a status code and `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastapi.responses import JSONResponse

from milora.serving.requests import AdapterError, ServingError
from milora_core.errors import MiLoraError

RETRY_SECONDS = 1
"""The `Retry-After` of temporary errors."""
MOST_ERRORS = 10_000
"""Errors of a body that are compared to find the one to report; a list of a million tokens may have one for each."""

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}

_OF_ENGINE: Mapping[str, tuple[int, str]] = {
    "invalid_request": (400, "invalid_value"),
    "prompt_too_long": (400, "context_length_exceeded"),
    "unknown_adapter": (404, "model_not_found"),
    "queue_full": (429, "queue_full"),
    "deadline": (503, "queue_timeout"),
    "engine_stopped": (503, "engine_stopped"),
    "numerical": (500, "numerical_error"),
    "failed": (500, "generation_failed"),
    "invalid_adapter": (400, "invalid_adapter"),
    "adapter_in_use": (409, "adapter_in_use"),
}
"""The HTTP status and OpenAI's `code` for each kind of engine error."""


class ApiError(Exception):
    """A response other than 200.

    Args:
        status: The status code.
        message: The problem, the value found and the fix.
        code: A machine-readable code, such as `model_not_found`.
        param: The invalid field of the request.
        retry_after: Seconds after which the same request may succeed.
        allow: The HTTP methods that the route supports.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after
        self.allow = allow

    @classmethod
    def of_generation(cls, error: MiLoraError) -> ApiError:
        """The response to an error that ended a text.

        If an adapter cannot be read, the message is generic: the request is not at fault, and the engine's message
        contains paths of the server.
        """
        if isinstance(error, AdapterError):
            return cls(
                503,
                "The adapter cannot be read at the moment; the server's log has the reason.",
                "adapter_unavailable",
                retry_after=RETRY_SECONDS,
            )
        return cls.of(error)

    @classmethod
    def of(cls, error: MiLoraError) -> ApiError:
        """The response to an error of the engine or of tokenization."""
        kind = error.kind if isinstance(error, ServingError) else "invalid_request"
        status, code = _OF_ENGINE.get(kind, (500, "generation_failed"))
        return cls(status, str(error), code, retry_after=RETRY_SECONDS if status in (429, 503) else None)

    def body(self) -> dict[str, Any]:
        """The body, in OpenAI's format."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The response with its headers."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.allow is not None:
            headers["Allow"] = self.allow
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def validation_error(errors: Sequence[Mapping[str, Any]], body: Any = None) -> ApiError:
    """The response to a body that pydantic rejected, about the first invalid field.

    Args:
        errors: pydantic's list of errors.
        body: The rejected body.
    """
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not JSON: {first['ctx']['error']}.", "invalid_json")
    places = [_Place.of(error, body) for error in errors[:MOST_ERRORS]]
    field = places[0].field
    same = [place for place in places if place.field[: len(field)] == field] if field else places[:1]
    # A field of several types has errors for each type. Those deepest in the value are about the types that it looks
    # like; of these, the type with the fewest errors was meant: one item of a list of texts is no text.
    depth = max(len(place.field) for place in same)
    deepest = [place for place in same if len(place.field) == depth]
    counts = Counter(place.types for place in deepest)
    meant = min(deepest, key=lambda place: counts[place.types])
    path = ".".join(map(str, meant.field))
    if meant.error["type"] == "extra_forbidden":
        return ApiError(400, f"The field {path!r} is not supported: remove it.", "unknown_field", param=path)
    about = [place for place in deepest if place.field == field] or [meant]
    message = ", or ".join(dict.fromkeys(place.message for place in about))
    return ApiError(400, f"{path}: {message}." if path else f"{message}.", "invalid_value", param=path or None)


class _Place(NamedTuple):
    """The place in the body that an error of pydantic is about."""

    error: Mapping[str, Any]
    field: tuple[str | int, ...]
    """The names and indices that lead to it."""
    types: tuple[str | int, ...]
    """The names of the types among which pydantic chose."""

    @classmethod
    def of(cls, error: Mapping[str, Any], body: Any) -> _Place:
        """Separates the names of types in an error's location from those of fields."""
        field: list[str | int] = []
        types: list[str | int] = []
        value = body
        parts = [part for part in error["loc"] if part != "body"]
        for index, part in enumerate(parts):
            is_item = isinstance(value, list) and isinstance(part, int) and 0 <= part < len(value)
            if is_item or (isinstance(value, dict) and part in value):
                value = value[part]
            elif error["type"] != "missing" or index < len(parts) - 1:
                types.append(part)
                continue
            field.append(part)
        return cls(error, tuple(field), tuple(types))

    @property
    def message(self) -> str:
        """What is wrong."""
        return str(self.error["msg"]).removeprefix("Value error, ").rstrip(".")
