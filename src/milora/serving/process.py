"""The process of `milora serve`: checks before the backbone is loaded, serving, and graceful shutdown."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from milora.serving.app import build_app
from milora.serving.logs import log
from milora.serving.service import Service
from milora.serving.tenants import TenantEntry, Tenants, read_digest, read_entries, read_file
from milora_core.errors import MiLoraError

KEYS_VARIABLE = "MILORA_KEYS"
"""The environment variable with the content of a key file."""
ADMIN_VARIABLE = "MILORA_ADMIN_KEY_SHA256"
LAST_SECONDS = 5
"""Maximum time to send the last responses after the engine has stopped."""


@dataclass(frozen=True)
class Address:
    """The address on which the server listens.

    Args:
        host: A host name or an IP address.
        port: The port; 0 selects a free one.
    """

    host: str = "127.0.0.1"
    port: int = 8000

    def bind(self) -> socket.socket:
        """A bound socket that does not listen yet.

        Raises:
            MiLoraError: If the address cannot be bound.
        """
        try:
            family, kind, protocol, _, place = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            bound = socket.socket(family, kind, protocol)
            try:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                bound.bind(place)
            except OSError:
                bound.close()
                raise
        except OSError as error:
            raise MiLoraError(
                f"The server cannot listen on {self.host}:{self.port}: {error.strerror or error}. Choose another "
                "--host or --port."
            ) from error
        return bound


def read_tenants(keys: Path | None, admin_key: Path | None, environment: Mapping[str, str] = os.environ) -> Tenants:
    """Reads the tenants from the files of the command line or from the environment.

    Args:
        keys: The key file. With `None`, the variable `MILORA_KEYS` has its content.
        admin_key: The file with the admin key's SHA-256. With `None`, the variable `MILORA_ADMIN_KEY_SHA256` has it.
        environment: The environment variables.

    Raises:
        MiLoraError: If a file or a variable cannot be read.
    """
    entries: list[TenantEntry] = []
    if keys is not None:
        entries = read_entries(read_file(keys, "The file of keys"), str(keys))
    elif environment.get(KEYS_VARIABLE):
        entries = read_entries(environment[KEYS_VARIABLE], f"The variable {KEYS_VARIABLE}")
    admin = None
    if admin_key is not None:
        admin = read_digest(read_file(admin_key, "The admin key's file"), str(admin_key))
    elif environment.get(ADMIN_VARIABLE):
        admin = read_digest(environment[ADMIN_VARIABLE], f"The variable {ADMIN_VARIABLE}")
    return Tenants(entries, admin)


def run(service: Service, listening: socket.socket, drain_seconds: float) -> None:
    """Serves until SIGTERM or SIGINT, then lets running requests finish.

    Meanwhile new requests get status 503 with `Retry-After`, and `/health` reports the shutdown. A second signal stops
    the server immediately.

    Args:
        service: The server's components. They are closed at the end.
        listening: A bound socket.
        drain_seconds: Maximum time for running requests to finish. After it they end with an error.
    """
    config = uvicorn.Config(
        build_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=LAST_SECONDS,
    )
    host, port = listening.getsockname()[:2]
    log("ready", host=host, port=port, adapters=len(service.engine.adapters()), needs_key=not service.tenants.is_open)
    try:
        _Server(config, service, drain_seconds).run(sockets=[listening])
    finally:
        service.close()
        log("stopped")


class _Server(uvicorn.Server):
    """A uvicorn server that drains at the first signal."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float) -> None:
        super().__init__(config)
        self._service = service
        self._drain_seconds = drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handles a signal."""
        if self._service.is_draining:
            super().handle_exit(sig, frame)
            return
        self._service.is_draining = True
        threading.Thread(target=self._drain, args=(signal.Signals(sig).name,), daemon=True).start()

    def _drain(self, cause: str) -> None:
        started = time.monotonic()
        log("draining", cause=cause)
        has_ended = self._service.engine.drain(self._drain_seconds)
        if not has_ended:
            self._service.engine.close()
        log(
            "drained",
            level=logging.INFO if has_ended else logging.WARNING,
            complete=has_ended,
            seconds=round(time.monotonic() - started, 3),
        )
        self.should_exit = True
