"""An HTTP server over a scripted engine, in the test process."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi.testclient import TestClient
from support.architectures import ARCHITECTURES
from support.fake_engine import FakeEngine
from support.tokenizer import character_tokenizer

from milora.serving.admission import Admission
from milora.serving.app import build_app
from milora.serving.process import Address
from milora.serving.prompts import Prompts
from milora.serving.service import Service, ServiceSettings
from milora.serving.tenants import TenantEntry, Tenants

ADMIN = "admin-key"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def entry(name: str, **fields: Any) -> TenantEntry:
    return TenantEntry(name=name, key_sha256=digest(f"{name}-key"), **fields)


@pytest.fixture(scope="session")
def backbone() -> Any:
    return ARCHITECTURES["llama"]()


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(adapters=["ada", "bo"])


@pytest.fixture
def make_service(backbone: Any, engine: FakeEngine, tmp_path: Path) -> Callable[..., Service]:
    def make(*entries: TenantEntry, admin: bool = True, **settings: Any) -> Service:
        tenants = Tenants(entries, digest(ADMIN) if admin else None)
        fields = {"model": "base", "positions": 128, **settings}
        prompts = Prompts(backbone, character_tokenizer(chat=True))
        return Service(engine, prompts, tenants, Admission(backbone, tmp_path), ServiceSettings(**fields))

    return make


@pytest.fixture
def client(make_service: Callable[..., Service]) -> TestClient:
    """A server that requires no keys, except for administration."""
    return TestClient(build_app(make_service()), raise_server_exceptions=False)


@pytest.fixture
def serve() -> Iterator[Callable[[Service], str]]:
    """Serves over real HTTP in a thread and returns the address."""
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(service: Service) -> str:
        listening = Address(port=0).bind()
        server = uvicorn.Server(uvicorn.Config(build_app(service), log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        servers.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        host, port = listening.getsockname()
        return f"http://{host}:{port}"

    yield start
    for server, thread in servers:
        server.should_exit = server.force_exit = True
        thread.join(10)
