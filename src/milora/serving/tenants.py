"""Tenants: API keys, the adapters that each key may use, and its limits."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from milora.serving.errors import ApiError
from milora_core.errors import MiLoraError

_DIGEST = r"^[0-9a-f]{64}$"


class TenantEntry(BaseModel):
    """A tenant in the key file.

    Attributes:
        name: The tenant's name in logs and metrics.
        key_sha256: SHA-256 of the API key, in hexadecimal. Keys must be random and long; use 32 bytes.
        adapters: Names of the adapters that the key may use, or patterns with `*`.
        backbone: Whether the key may also use the bare backbone.
        metrics: Whether the key may read `/metrics`, which shows the figures of all tenants.
        concurrent_requests: Maximum number of concurrent requests; `None` for no limit.
        tokens_per_minute: Maximum number of prompt and new tokens per minute; `None` for no limit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[\w.-]{1,64}$")
    key_sha256: str = Field(pattern=_DIGEST)
    adapters: tuple[str, ...] = ()
    backbone: bool = False
    metrics: bool = False
    concurrent_requests: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)


@dataclass
class Tenant:
    """A tenant and its current use. Only the event loop's thread may access it.

    Attributes:
        name: The tenant's name in logs and metrics.
        adapters: Names or patterns of adapters.
        backbone: Whether it may use the bare backbone.
        reads_metrics: Whether it may read `/metrics`.
        is_admin: Whether it may load and unload adapters.
        concurrent_requests: Maximum number of concurrent requests.
        tokens_per_minute: Maximum number of tokens per minute.
        clock: A monotonic clock, in seconds.
    """

    name: str
    adapters: tuple[str, ...] = ()
    backbone: bool = False
    reads_metrics: bool = False
    is_admin: bool = False
    concurrent_requests: int | None = None
    tokens_per_minute: int | None = None
    clock: Callable[[], float] = time.monotonic
    _running: int = field(default=0, init=False)
    _tokens: float = field(default=0.0, init=False)
    _filled: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._tokens = float(self.tokens_per_minute or 0)
        self._filled = self.clock()

    def may_use(self, adapter: str) -> bool:
        """Whether the tenant may use an adapter."""
        return any(fnmatchcase(adapter, pattern) for pattern in self.adapters)

    def begin(self) -> None:
        """Counts the start of a request.

        Raises:
            ApiError: If the key's limit of concurrent requests is reached.
        """
        if self.concurrent_requests is not None and self._running >= self.concurrent_requests:
            raise ApiError(
                429,
                f"This key allows {self.concurrent_requests} requests at a time: wait until one has ended.",
                "rate_limit_exceeded",
                retry_after=1,
            )
        self._running += 1

    def end(self) -> None:
        """Counts the end of a request."""
        self._running -= 1

    def reserve(self, tokens: int) -> None:
        """Reserves a request's prompt tokens and its maximum of new tokens.

        The budget refills evenly, by `tokens_per_minute / 60` per second.

        Raises:
            ApiError: If the tokens exceed the key's limit or the remaining budget.
        """
        limit = self.tokens_per_minute
        if limit is None:
            return
        if tokens > limit:
            raise ApiError(
                400,
                f"The request may take {tokens} tokens, and this key allows {limit} a minute: shorten the prompt, or "
                "lower max_tokens or n.",
                "tokens_per_minute_exceeded",
            )
        now = self.clock()
        self._tokens = min(float(limit), self._tokens + (now - self._filled) * limit / 60)
        self._filled = now
        if tokens > self._tokens:
            seconds = int((tokens - self._tokens) * 60 / limit) + 1
            raise ApiError(
                429,
                f"This key allows {limit} tokens a minute: try again in {seconds} seconds.",
                "rate_limit_exceeded",
                retry_after=seconds,
            )
        self._tokens -= tokens

    def give_back(self, tokens: int) -> None:
        """Returns reserved tokens that were not generated."""
        if self.tokens_per_minute is not None:
            self._tokens += tokens


class Tenants:
    """All tenants by key.

    Without keys, all requests belong to one tenant that may use all adapters. Only digests of the keys are stored.

    Args:
        entries: The tenants with keys.
        admin_sha256: SHA-256 of the key that may load and unload adapters; `None` to disable this.
        clock: A monotonic clock, in seconds.

    Raises:
        MiLoraError: If two tenants have the same name or the same key.
    """

    def __init__(
        self,
        entries: Iterable[TenantEntry] = (),
        admin_sha256: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._by_digest: dict[str, Tenant] = {}
        for entry in entries:
            if any(entry.name == other.name for other in self._by_digest.values()):
                raise MiLoraError(f"Two tenants are called {entry.name!r} in the file of keys: give each a name.")
            tenant = Tenant(
                entry.name,
                entry.adapters,
                entry.backbone,
                reads_metrics=entry.metrics,
                concurrent_requests=entry.concurrent_requests,
                tokens_per_minute=entry.tokens_per_minute,
                clock=clock,
            )
            self._add(entry.key_sha256, tenant)
        self._open = None if self._by_digest else Tenant("everyone", ("*",), True, reads_metrics=True, clock=clock)
        self.has_admin = admin_sha256 is not None
        if admin_sha256 is not None:
            self._add(admin_sha256, Tenant("admin", ("*",), True, reads_metrics=True, is_admin=True, clock=clock))

    @property
    def is_open(self) -> bool:
        """Whether requests need no key."""
        return self._open is not None

    def of(self, authorization: str | None) -> Tenant | None:
        """The tenant of an `Authorization` header; `None` without a known key.

        The digest is compared with all known digests, so the comparison takes the same time for every key.
        """
        scheme, _, key = (authorization or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).hexdigest()
        found = None
        for known, tenant in self._by_digest.items():
            if hmac.compare_digest(known, digest):
                found = tenant
        return found if found is not None and scheme.lower() == "bearer" else self._open

    def _add(self, digest: str, tenant: Tenant) -> None:
        if digest in self._by_digest:
            raise MiLoraError(f"{self._by_digest[digest].name} and {tenant.name} have one key: give each its own.")
        self._by_digest[digest] = tenant


def read_entries(text: str, source: str) -> list[TenantEntry]:
    """The tenants of a key file, in YAML or JSON.

    Args:
        text: The file's content.
        source: The file's name for errors.

    Raises:
        MiLoraError: If the content is not a list of tenants.
    """
    try:
        parsed = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise MiLoraError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(parsed, Mapping) or not isinstance(parsed.get("tenants"), list) or not parsed["tenants"]:
        raise MiLoraError(f"{source} must have a list `tenants` with at least one entry (name, key_sha256, adapters).")
    try:
        return TypeAdapter(list[TenantEntry]).validate_python(parsed["tenants"])
    except ValidationError as error:
        raise MiLoraError(f"{source}: {_first(error.errors())}") from error


def read_digest(text: str, source: str) -> str:
    """A SHA-256 in hexadecimal, as `sha256sum` prints it.

    Raises:
        MiLoraError: If the text is not a SHA-256.
    """
    words = text.split()
    digest = words[0].lower() if words else ""
    if len(digest) != 64 or any(character not in "0123456789abcdef" for character in digest):
        raise MiLoraError(f"{source} must hold the SHA-256 of the key, 64 hexadecimal digits, as sha256sum prints it.")
    return digest


def read_file(path: Path, what: str) -> str:
    """The text of a file named on the command line.

    Raises:
        MiLoraError: If the file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise MiLoraError(f"{what} {path} cannot be read: {reason}.") from error


def _first(errors: list[Any]) -> str:
    """The first of pydantic's errors, without the value because it may be a key."""
    place = ".".join(str(part + 1) if isinstance(part, int) else str(part) for part in errors[0]["loc"])
    return f"tenant {place}: {errors[0]['msg']}."
