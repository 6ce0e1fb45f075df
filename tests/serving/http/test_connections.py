"""Over real HTTP: clients that disconnect or stop reading, draining, logs."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx2
import openai
import pytest
from fastapi.testclient import TestClient
from support.fake_engine import FakeEngine, spelled

from milora.serving.app import build_app
from milora.serving.connection import EventStream
from milora.serving.events import TokenEvent
from milora.serving.logs import JsonFormatter
from milora.serving.service import Service

from .conftest import bearer, entry

Serve = Callable[[Service], str]
MakeService = Callable[..., Service]


def raw(address: str, **body: Any) -> socket.socket:
    """A connection that has sent a request but reads nothing."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    content = json.dumps({"model": "ada", "prompt": "hey", **body}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    connection.sendall(f"{head}\r\n\r\n".encode() + content)
    return connection


def settled(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_leaves_cancels_its_request(
    make_service: MakeService, serve: Serve, engine: FakeEngine, stream: bool, begun: bool, caplog: Any
) -> None:
    engine.script = lambda request: [*(spelled("ab", finish=None) if begun else ()), None]  # type: ignore[list-item]
    service = make_service(entry("x"), entry("ada", adapters=["*"], concurrent_requests=1), admin=False)
    service.tenants._open = service.tenants.of("Bearer ada-key")
    with caplog.at_level("INFO", "milora.serving"):
        connection = raw(serve(service), stream=stream)
        assert settled(lambda: len(engine.generations) == 1)
        if stream and begun:
            assert b"200 OK" in connection.recv(1000)
        connection.close()
        assert engine.cancelled.wait(20)
        assert settled(lambda: any(record.msg == "request" for record in caplog.records))
    fields = next(record for record in caplog.records if record.msg == "request").__dict__["fields"]
    assert fields["status"] == 499
    tenant = service.tenants.of("Bearer ada-key")
    assert tenant is not None
    assert tenant._running == 0


def test_a_client_that_stops_reading_counts_as_gone(
    make_service: MakeService, serve: Serve, engine: FakeEngine, caplog: Any
) -> None:
    piece = "x" * 100_000
    engine.script = lambda request: [*[TokenEvent(0, piece, (1,))] * 200, None]  # type: ignore[list-item]
    address = serve(make_service(stall_seconds=0.2))
    connection = raw(address, stream=True)
    assert engine.cancelled.wait(30)
    # Other requests are still served.
    engine.script = lambda request: spelled("yes")
    body = {"model": "ada", "prompt": "hey"}
    assert httpx2.post(f"{address}/v1/completions", json=body).json()["choices"][0]["text"] == "yes"
    connection.close()


def test_a_stream_that_is_never_begun_ends_its_request_too() -> None:
    ended: list[bool] = []

    async def chunks() -> AsyncGenerator[bytes, None]:
        yield b"never read"

    async def gone() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await asyncio.sleep(60)

    asyncio.run(EventStream(chunks(), 60, ended.append)({"type": "http"}, gone, send))
    assert ended == [True]


def test_the_openai_client(make_service: MakeService, serve: Serve, engine: FakeEngine) -> None:
    engine.script = lambda request: spelled("yes", index=0)
    address = serve(make_service(entry("ada", adapters=["ada"])))
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="ada-key", max_retries=0)
    assert [model.id for model in client.models.list()] == ["ada"]
    assert client.models.retrieve("ada").id == "ada"
    assert client.completions.create(model="ada", prompt="hey").choices[0].text == "yes"
    messages: Any = [{"role": "user", "content": "hey"}]
    whole = client.chat.completions.create(model="ada", messages=messages, extra_body={"milora": {"route": True}})
    assert whole.choices[0].message.content == "yes"
    assert whole.choices[0].model_extra == {"stop_reason": None, "milora": {"route": None}}
    stream = client.chat.completions.create(
        model="ada", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "yes"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="bo", prompt="hey")
    with pytest.raises(openai.BadRequestError, match="not supported"):
        client.completions.create(model="ada", prompt="hey", echo=True)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").models.list()


def test_a_draining_server_says_so(make_service: MakeService, engine: FakeEngine) -> None:
    service = make_service(entry("ada", adapters=["ada"], metrics=True))
    client = TestClient(build_app(service))
    service.is_draining = True
    health = client.get("/health")
    assert (health.status_code, health.json()) == (503, {"status": "draining"})
    refused = client.post("/v1/completions", json={"model": "ada", "prompt": "a"}, headers=bearer("ada-key"))
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) > 0
    assert "milora_draining 1.0" in client.get("/metrics", headers=bearer("ada-key")).text
    assert engine.requests == []


def test_health_is_the_engine_s(client: TestClient, engine: FakeEngine) -> None:
    engine.unhealthy = "/secret/path broke"
    response = client.get("/health")
    assert (response.status_code, response.json()) == (503, {"status": "failed"})


def test_a_request_is_a_line_of_json_without_its_prompt(client: TestClient, engine: FakeEngine, caplog: Any) -> None:
    engine.script = lambda request: spelled("yes", cached_tokens=1)
    with caplog.at_level("INFO", "milora.serving"):
        response = client.post("/v1/completions", json={"model": "ada", "prompt": "hey"}, headers=bearer("hidden"))
        client.get("/health")
        client.get("/v1/else/../../secret")
    first, second = (json.loads(JsonFormatter().format(record)) for record in caplog.records)
    assert first["id"] == response.headers["x-request-id"]
    assert {name: first[name] for name in ("event", "level", "tenant", "model", "route", "status", "stream")} == {
        "event": "request",
        "level": "info",
        "tenant": "everyone",
        "model": "ada",
        "route": "/v1/completions",
        "status": 200,
        "stream": False,
    }
    counts = ("prompt_tokens", "completion_tokens", "cached_tokens", "finish_reasons")
    assert [first[name] for name in counts] == [3, 3, 1, ["stop"]]
    assert (second["route"], second["status"], second["code"]) == ("other", 404, "no_such_route")
    lines = [JsonFormatter().format(record) for record in caplog.records]
    assert not any(word in line for line in lines for word in ("hey", "yes", "hidden", "secret"))


def test_other_methods_and_other_routes(client: TestClient) -> None:
    refused = client.put("/v1/completions", json={})
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert refused.json()["error"]["code"] == "method_not_allowed"
    assert client.post("/v1/completions/", json={}).status_code == 404
