"""A real `milora serve`: texts equal `generate` alone while the server is under stress."""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from support.serving import ADMIN, ServerProcess, write_keys
from support.tenants import KINDS, Alone, saved_adapters
from support.tokenizer import CHARACTERS, END, character_tokenizer, save_backbone

from milora.inference.generation import encode_prompt
from milora.serving import logs
from milora_cli.main import main

pytestmark = pytest.mark.slow

TOKENIZER = character_tokenizer(chat=True)
TWENTY = {f"{name}-{copy}": settings for name, settings in KINDS.items() for copy in "ab"}


@dataclass(frozen=True)
class World:
    backbone: Path
    adapters: Path
    alone: Alone

    def expected(self, adapter: str | None, prompt: str, new_tokens: int, *, chat: bool = False) -> str:
        """The text of `generate` alone."""
        given: Any = [{"role": "user", "content": prompt}] if chat else prompt
        ids = tuple(encode_prompt(TOKENIZER, given))
        tokens = self.alone(adapter, ids, new_tokens, eos_token_id=END, pad_token_id=0)
        return str(TOKENIZER.decode(tokens, skip_special_tokens=True))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("served")
    backbone = save_backbone(folder / "backbone", chat=True)
    folders = saved_adapters(folder / "adapters", "llama", TWENTY)
    return World(backbone, folder / "adapters", Alone("llama", folders))


def words(generator: random.Random, low: int = 4, high: int = 60) -> str:
    return "".join(generator.choice(CHARACTERS) for _ in range(generator.randint(low, high)))


async def ask(
    client: openai.AsyncOpenAI, model: str, prompt: str, new_tokens: int, *, stream: bool = False, chat: bool = False
) -> str:
    """A greedy text from the openai client: completion or chat, complete or streamed."""
    common: dict[str, Any] = {"model": model, "max_tokens": new_tokens, "temperature": 0, "stream": stream}
    if chat:
        messages: Any = [{"role": "user", "content": prompt}]
        answer: Any = await client.chat.completions.create(messages=messages, **common)
        if not stream:
            return str(answer.choices[0].message.content)
        return "".join([chunk.choices[0].delta.content async for chunk in answer])
    answer = await client.completions.create(prompt=prompt, **common)
    if not stream:
        return str(answer.choices[0].text)
    return "".join([chunk.choices[0].text async for chunk in answer])


def test_200_requests_of_20_tenants_are_each_as_generate_alone(world: World, tmp_path: Path) -> None:
    names = sorted(path.name for path in world.adapters.iterdir())
    assert len(names) == 20
    keys = write_keys(tmp_path, {name: {"adapters": [name], "backbone": True} for name in names})
    generator = random.Random(3)
    requests = []
    for number in range(200):
        tenant = names[number % 20]
        adapter = None if number % 11 == 0 else tenant
        chat, stream = number % 3 == 0, number % 2 == 0
        requests.append((tenant, adapter, words(generator), generator.randint(8, 24), stream, chat))
    due = [generator.uniform(0, 2) for _ in requests]

    async def all_of_them(url: str, backbone: str) -> list[str]:
        async def one(number: int, client: httpx2.AsyncClient) -> str:
            tenant, adapter, prompt, tokens, stream, chat = requests[number]
            await asyncio.sleep(due[number])
            own = openai.AsyncOpenAI(
                base_url=f"{url}/v1", api_key=f"{tenant}-key", max_retries=0, timeout=300, http_client=client
            )
            return await ask(own, adapter or backbone, prompt, tokens, stream=stream, chat=chat)

        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(limits=limits, timeout=300) as client:
            return await asyncio.gather(*(one(number, client) for number in range(len(requests))))

    with ServerProcess("--backbone", world.backbone, "--adapters", world.adapters, *keys) as server:
        texts = asyncio.run(all_of_them(server.url, str(world.backbone)))
        assert server.end() == 0
    lines = server.events("request")
    assert len(lines) == 200
    assert all(line["status"] == 200 for line in lines)
    wrong = [
        number
        for number, (_, adapter, prompt, tokens, _, chat) in enumerate(requests)
        if texts[number] != world.expected(adapter, prompt, tokens, chat=chat)
    ]
    assert wrong == []
    assert len(set(texts)) > 150


@pytest.fixture
def open_server(world: World, tmp_path: Path) -> Any:
    """A server that requires no keys, except for administration, with a copy of the adapters."""
    shutil.copytree(world.adapters, tmp_path / "adapters")
    keys = write_keys(tmp_path, {"unused": {}})[2:]
    with ServerProcess(
        "--backbone", world.backbone, "--served-model-name", "base", "--adapters", tmp_path / "adapters",
        "--kv-cache-mib", "1", "--drain-seconds", "60", *keys
    ) as server:  # fmt: skip
        yield server


def client_of(server: ServerProcess, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=120)


def test_adapters_are_replaced_under_load(world: World, open_server: ServerProcess) -> None:
    """Each text comes from one of the adapters that had the name, or the request is refused."""
    versions = ["milora-a", "late-a", "lora"]
    generator = random.Random(5)
    prompts = [words(generator, 10, 50) for _ in range(8)]
    right = {(version, prompt): world.expected(version, prompt, 16) for version in versions for prompt in prompts}
    refused: list[int] = []
    texts: list[tuple[str, str]] = []
    statuses: list[int] = []
    is_over = False

    async def reader(client: openai.AsyncOpenAI, number: int) -> None:
        while not is_over:
            prompt = prompts[(number + len(texts)) % len(prompts)]
            try:
                texts.append((prompt, await ask(client, "swap", prompt, 16, stream=number % 2 == 0)))
            except openai.APIStatusError as error:
                refused.append(error.status_code)
            # An adapter is replaced between requests, so they must not follow each other without a gap.
            await asyncio.sleep(generator.uniform(0.02, 0.3))

    async def others(client: openai.AsyncOpenAI) -> list[str]:
        return [await ask(client, "window-a", prompt, 16) for prompt in prompts * 2]

    async def change() -> None:
        headers = {"Authorization": f"Bearer {ADMIN}"}
        async with httpx2.AsyncClient(headers=headers, timeout=60) as client:
            end = time.monotonic() + 60
            while statuses.count(200) < 5 and time.monotonic() < end:
                version = versions[statuses.count(200) % 3]
                body = {"lora_name": "swap", "lora_path": version, "load_inplace": True}
                response = await client.post(f"{open_server.url}/v1/load_lora_adapter", json=body)
                statuses.append(response.status_code)
                await asyncio.sleep(0.05)

    async def everything() -> list[str]:
        nonlocal is_over
        client = client_of(open_server)
        readers = [asyncio.ensure_future(reader(client, number)) for number in range(3)]
        beside = asyncio.ensure_future(others(client))
        await change()
        is_over = True
        await asyncio.gather(*readers)
        texts_beside = await beside
        await client.close()
        return texts_beside

    beside = asyncio.run(everything())
    assert beside == [world.expected("window-a", prompt, 16) for prompt in prompts * 2]
    assert set(refused) <= {404}
    assert set(statuses) <= {200, 409}
    assert statuses.count(200) >= 2
    assert texts
    assert all(text in {right[version, prompt] for version in versions} for prompt, text in texts)
    assert open_server.end() == 0


def test_memory_clients_that_leave_and_sigterm(world: World, open_server: ServerProcess) -> None:
    """Texts stay right with more texts than the cache holds, clients that leave or do not read, then SIGTERM."""
    generator = random.Random(6)
    prompts = [words(generator, 60, 90) for _ in range(24)]
    models = ["milora-b", "late-a"]
    host, port = open_server.url.removeprefix("http://").split(":")

    def leave(prompt: str) -> socket.socket:
        connection = socket.create_connection((host, int(port)))
        body = f'{{"model": "late-b", "prompt": [1, 2, 3, {len(prompt)}], "max_tokens": 100, "stream": true}}'
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        connection.sendall(f"{head}\r\n\r\n{body}".encode())
        return connection

    async def under_load() -> Sequence[str]:
        client = client_of(open_server)
        asked = [
            asyncio.ensure_future(
                ask(client, "late-a" if number % 2 else "milora-b", prompt, 30, stream=number % 3 == 0)
            )
            for number, prompt in enumerate(prompts)
        ]
        connections = [leave(prompt) for prompt in prompts[:8]]
        await asyncio.sleep(0.3)
        for connection in connections[:4]:
            connection.close()
        async with httpx2.AsyncClient(timeout=60) as other:
            assert (await other.get(f"{open_server.url}/health")).json() == {"status": "ok"}
            open_server.process.send_signal(signal.SIGTERM)
            while (health := await other.get(f"{open_server.url}/health")).status_code == 200:
                await asyncio.sleep(0.005)
            assert health.json() == {"status": "draining"}
            late = await other.post(f"{open_server.url}/v1/completions", json={"model": "base", "prompt": "a"})
            assert late.status_code == 503
            assert "retry-after" in late.headers
        texts = await asyncio.gather(*asked)
        for connection in connections[4:]:
            connection.close()
        await client.close()
        return texts

    texts = asyncio.run(under_load())
    assert texts == [world.expected(models[number % 2], prompt, 30) for number, prompt in enumerate(prompts)]
    assert open_server.process.wait(60) == 0
    drained = open_server.events("drained")[0]
    assert drained["complete"] is True
    assert open_server.other_lines == []


def test_a_killed_server_starts_again(world: World, tmp_path: Path) -> None:
    options = ["--backbone", world.backbone, "--served-model-name", "base", "--adapters", world.adapters]

    async def one(server: ServerProcess) -> str:
        async with client_of(server) as client:
            return await ask(client, "late-a", "hey there", 12)

    async def until_killed(server: ServerProcess) -> None:
        async with client_of(server) as client:
            asked = asyncio.ensure_future(ask(client, "late-a", "hey", 100, stream=True))
            await asyncio.sleep(0.1)
            server.kill()
            with pytest.raises((openai.APIError, httpx2.HTTPError)):
                await asked

    for _ in range(2):
        with ServerProcess(*options) as server:
            assert asyncio.run(one(server)) == world.expected("late-a", "hey there", 12)
            asyncio.run(until_killed(server))


def test_a_drain_that_takes_too_long_ends_requests_with_an_error(world: World) -> None:
    options = ["--backbone", world.backbone, "--served-model-name", "base", "--drain-seconds", "0"]

    async def cut(server: ServerProcess) -> None:
        async with client_of(server) as client:
            stream = await client.completions.create(
                model="base", prompt="hey", max_tokens=120, stream=True, extra_body={"ignore_eos": True}
            )
            await anext(aiter(stream))
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIError, match="engine"):
                [chunk async for chunk in stream]

    with ServerProcess(*options) as server:
        asyncio.run(cut(server))
        assert server.process.wait(60) == 0
        assert server.events("drained")[0]["complete"] is False


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--backbone", "tiny", "--adapters", "nowhere"], "--adapters nowhere: there is no such folder"),
        (["--backbone", "tiny", "--keys", "nowhere"], "The file of keys nowhere cannot be read"),
        (["--backbone", "tiny", "--log-level", "loud"], "--log-level takes"),
        (["--backbone", "tiny", "--adapters", "nowhere", "--drain-seconds", "inf"], "'--drain-seconds': found inf"),
        (["--backbone", "tiny", "--adapters", "nowhere", "--drain-seconds", "nan"], "'--drain-seconds'"),
        (["--backbone", "tiny", "--adapters", "nowhere", "--drain-seconds", "-1"], "'--drain-seconds'"),
        (["--backbone", "tiny", "--adapters", "nowhere", "--queue-seconds", "nan"], "'--queue-seconds'"),
        (["--backbone", "tiny", "--host", "256.0.0.1"], "cannot listen on 256.0.0.1:8000"),
        (["--backbone", "./nowhere", "--port", "0"], "there is no such backbone"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str], said: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Keep pytest's own handlers.
    monkeypatch.setattr(logs, "configure", lambda level: None)
    assert main(["serve", *options]) == 2
    error = capfd.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_port_in_use_is_known_before_the_backbone_is_loaded(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "configure", lambda level: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--backbone", "nowhere", "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capfd.readouterr().err
