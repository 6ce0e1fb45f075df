"""Sends thousands of wrong, hostile and ordinary requests to a `milora serve`, and checks for failures.

    python scripts/fuzz_serve.py --requests 10000

Failures are a crash, an unintended 5xx, an error that is not in OpenAI's format, a text that differs from the tenant's
text without other requests, a name or a text of another tenant, a prompt or a key in the log, and requests that remain
in the engine. The same seed sends the same requests. Prints a JSON object. The exit status is 1 after a failure.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2

TENANTS = ("ada", "bo", "cy")
ADMIN_KEY = "key-of-the-admin-0123456789"
BY_DESIGN = {"queue_timeout", "adapter_unavailable"}
NEW_TOKENS = 8

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 0.0, -0.0, 1e-30, 1e308, -1e308, "", " ", "\0",
    "a" * 5000, "\u202e\u0000", "\ud83d\ude00" * 50, "../../etc/passwd", "{{7*7}}", "%s%n", [], [[]], [None], [0], [-1],
    [2**40], [[1, 2], [3]], ["a", 1], [""], {}, {"a": 1}, {"route": True}, {"include_usage": True},
    [{"role": "user", "content": "x"}], [{"role": "user", "content": {"a": []}}], [{"role": 1, "content": None}],
    {"blocks": [], "experts": [], "gates": []}, {"route": {"blocks": ["x"], "experts": ["y"], "gates": [[[1.0]]]}},
]  # fmt: skip
FIELDS = [
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p",
    "seed", "stop", "stop_token_ids", "n", "logprobs", "top_logprobs", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "ignore_eos", "use_beam_search", "length_penalty", "include_stop_str_in_output", "stream",
    "stream_options", "user", "milora", "echo", "best_of", "logit_bias", "tools", "response_format", "suffix", "\0",
]  # fmt: skip
PATHS = [
    "/", "/v1", "/v1/", "/v1/completions/", "/v1//completions", "/v1/models/..%2f..", "/v1/models/ada", "/v1/models/bo",
    "/v1/models/%00", "/v1/models/" + "x" * 3000, "/metrics", "/health", "/version", "/docs", "/openapi.json",
    "/v1/embeddings", "/..%2f..%2fetc/passwd", "/v1/../metrics", "/%ff%fe", "/v1/completions?x=%00", "/favicon.ico",
]  # fmt: skip
LORA_PATHS = [
    "", ".", "..", "/", "/etc", "/etc/passwd", "../outside", "ada/../../outside", "link", "ada", "\0", "a" * 5000,
    "broken-header", "broken-config", "pickled", "biased", "nowhere", "~", "$HOME", "file:///etc", "//", "ada\n",
]  # fmt: skip
RAW = [
    b"", b"\r\n\r\n", b"GET", b"GET / HTTP/1.1\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", b"\0" * 1000,
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n{",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 5000 + b"\r\n",
]  # fmt: skip


def key_of(tenant: str) -> str:
    """A tenant's API key."""
    return f"key-of-{tenant}-0123456789abcdef"


def make_adapters(root: Path) -> None:
    """Creates an adapter for each tenant, and folders that must not be loaded."""
    import shutil

    import torch
    from peft import get_peft_model

    from milora import MiLoraConfig
    from milora.backbone.loading import load_backbone

    for seed, name in enumerate((*TENANTS, "outside")):
        torch.manual_seed(seed)
        late = {"adapted_tokens": "completion", "pooler": "last"} if seed % 2 else {}
        model = get_peft_model(load_backbone("tiny", device="cpu")[0], MiLoraConfig(r=4, top_k=2, **late))
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data.normal_(std=0.3)
        model.save_pretrained(root / "adapters" / name)
    adapters = root / "adapters"
    (adapters / "outside").rename(root / "outside")
    (adapters / "link").symlink_to(root / "outside")
    for name in ("broken-header", "broken-config", "pickled", "biased"):
        shutil.copytree(adapters / "ada", adapters / name)
    weights = adapters / "broken-header" / "adapter_model.safetensors"
    weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])
    (adapters / "broken-config" / "adapter_config.json").write_text("[" * 10000)
    (adapters / "pickled" / "adapter_model.safetensors").rename(adapters / "pickled" / "adapter_model.bin")
    config = adapters / "biased" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "bias": "all"}))


class Server:
    """The process under test."""

    def __init__(self, root: Path) -> None:
        digests = {name: hashlib.sha256(key_of(name).encode()).hexdigest() for name in TENANTS}
        entries: list[dict[str, Any]] = [
            {"name": name, "key_sha256": digest, "adapters": [name], "backbone": name == "ada"}
            for name, digest in digests.items()
        ]
        (root / "keys.yaml").write_text(json.dumps({"tenants": entries}))
        (root / "admin").write_text(hashlib.sha256(ADMIN_KEY.encode()).hexdigest())
        self.process = subprocess.Popen(
            [sys.executable, "-m", "milora", "serve", "--backbone", "tiny", "--adapters", str(root / "adapters"),
             "--port", "0", "--keys", str(root / "keys.yaml"), "--admin-key-file", str(root / "admin"),
             "--kv-cache-mib", "64", "--device", "cpu"],
            stderr=subprocess.PIPE, text=True, errors="replace",
        )  # fmt: skip
        self.log: list[str] = []
        ready = threading.Event()

        def read() -> None:
            assert self.process.stderr is not None
            for line in self.process.stderr:
                self.log.append(line)
                if '"ready"' in line:
                    ready.set()
            ready.set()

        threading.Thread(target=read, daemon=True).start()
        ready.wait(120)
        if self.process.poll() is not None:
            sys.exit("The server did not start:\n" + "".join(self.log))
        said = json.loads(next(line for line in self.log if '"ready"' in line))
        self.host, self.port = str(said["host"]), int(said["port"])
        self.url = f"http://{self.host}:{self.port}"

    def memory(self) -> int:
        """MiB of resident memory."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) // 1024
        return 0


class Fuzzer:
    """Requests from a seed, and the failures of their answers."""

    def __init__(self, server: Server, client: httpx2.AsyncClient, seed: int) -> None:
        self.server, self.client = server, client
        self.random = random.Random(seed)
        self.failures: list[str] = []
        self.statuses: Counter[str] = Counter()
        self.expected: dict[tuple[str, str], str] = {}
        self.kinds: list[Callable[[], Awaitable[None]]] = [
            self._ordinary, self._ordinary, self._mutated, self._mutated, self._mutated, self._foreign, self._not_json,
            self._path, self._wrong_key, self._load, self._load, self._raw, self._leave, self._large,
        ]  # fmt: skip

    def _prompt(self, tenant: str) -> str:
        """One of a few prompts of a tenant. Each contains a word that identifies the tenant."""
        return f"Question: secretof{tenant} {self.random.choice('abcdef')}?"

    async def learn(self) -> None:
        """Stores each tenant's texts without other requests. Adapters must differ, or a mix-up would go unnoticed."""
        texts = set()
        for tenant in TENANTS:
            response = await self.send("admin", self.body(tenant, "Question: which?"))
            texts.add(response.json()["choices"][0]["text"])
        if len(texts) < len(TENANTS):
            self.failures.append(f"The adapters write the same: {texts}")
        for tenant in TENANTS:
            for letter in "abcdef":
                prompt = f"Question: secretof{tenant} {letter}?"
                response = await self.send(tenant, self.body(tenant, prompt))
                self.expected[tenant, prompt] = response.json()["choices"][0]["text"]

    def body(self, tenant: str, prompt: str) -> dict[str, Any]:
        """An ordinary request."""
        return {"model": tenant, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}

    async def send(self, tenant: str, body: Any, path: str = "/v1/completions") -> httpx2.Response:
        """Sends a request with a tenant's key and checks the answer."""
        key = ADMIN_KEY if tenant == "admin" else key_of(tenant)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        return self._check(tenant, await self.client.post(self.server.url + path, content=content, headers=headers))

    def _check(self, tenant: str, response: httpx2.Response) -> httpx2.Response:
        """Checks the conditions that hold for every answer."""
        status, text = response.status_code, response.text
        self.statuses[str(status)] += 1
        if response.request.method == "HEAD":
            return response
        if status >= 400 and response.headers.get("content-type", "").startswith("application/json"):
            try:
                error = response.json()["error"]
                is_designed = error["code"] in BY_DESIGN and status == 503
                if set(error) != {"message", "type", "param", "code"}:
                    self._fail("form", response)
            except (ValueError, KeyError, TypeError):
                self._fail("form", response)
                return response
        else:
            is_designed = False
            if status >= 400 and "/v1/" in str(response.url):
                self._fail("form", response)
        if status >= 500 and not is_designed and "health" not in str(response.url):
            self._fail("5xx", response)
        for other in TENANTS:
            if other != tenant and tenant != "admin" and (f"secretof{other}" in text or f"key-of-{other}" in text):
                self._fail(f"text of {other} for {tenant}", response)
        if "Traceback" in text or "site-packages" in text or "/adapters/" in text:
            self._fail("inside of the server", response)
        return response

    def _fail(self, what: str, response: httpx2.Response | None = None) -> None:
        where = "" if response is None else f"{response.status_code} {response.request.url}: {response.text[:300]}"
        self.failures.append(f"{what}: {where}")

    def _check_text(self, tenant: str, prompt: str, text: str) -> None:
        if text != self.expected[tenant, prompt]:
            self.failures.append(f"{tenant} got {text!r} for {prompt!r}; alone it is {self.expected[tenant, prompt]!r}")

    async def _ordinary(self) -> None:
        tenant = self.random.choice(TENANTS)
        prompt = self._prompt(tenant)
        is_streamed = self.random.random() < 0.5
        response = await self.send(tenant, {**self.body(tenant, prompt), "stream": is_streamed})
        if response.status_code == 503:
            return
        if response.status_code != 200:
            self._fail("an ordinary request", response)
        elif is_streamed:
            lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
            pieces = [json.loads(line)["choices"][0]["text"] for line in lines if line != "[DONE]"]
            self._check_text(tenant, prompt, "".join(pieces))
        else:
            self._check_text(tenant, prompt, response.json()["choices"][0]["text"])

    async def _mutated(self) -> None:
        tenant = self.random.choice(TENANTS)
        body: dict[str, Any] = self.body(tenant, self._prompt(tenant))
        path = "/v1/completions"
        if self.random.random() < 0.4:
            path = "/v1/chat/completions"
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        for _ in range(self.random.randint(1, 3)):
            body[self.random.choice(FIELDS)] = self.random.choice(NASTY)
        if isinstance(body.get("max_tokens"), int) and body["max_tokens"] > 64:
            body["max_tokens"] = 64
        if self.random.random() < 0.1:
            del body[self.random.choice(list(body))]
        if body.get("max_tokens") is None and path.endswith("/chat/completions"):
            body["max_completion_tokens"] = NEW_TOKENS
        if body.get("max_tokens", 1) is None:
            body["max_tokens"] = NEW_TOKENS
        response = await self.send(tenant, body, path)
        if response.status_code not in (200, 400, 404, 503):
            self._fail("a mutated request", response)
        if response.status_code == 200 and body["model"] not in (tenant, "tiny"):
            self._fail("a model of somebody else", response)

    async def _foreign(self) -> None:
        tenant, other = self.random.sample(TENANTS, 2)
        body = self.body(other, self._prompt(tenant))
        body["model"] = self.random.choice([other, f"{other} ", f"../{other}", other.upper(), "*", "adapter0", "tiny"])
        if body["model"] == "tiny" and tenant == "ada":
            return
        response = await self.send(tenant, body)
        if response.status_code != 404:
            self._fail("a foreign model", response)
        headers = {"Authorization": f"Bearer {key_of(tenant)}"}
        listed = self._check(tenant, await self.client.get(f"{self.server.url}/v1/models", headers=headers)).json()
        names = {card["id"] for card in listed["data"]}
        if names != {tenant} | ({"tiny"} if tenant == "ada" else set()):
            self.failures.append(f"{tenant} sees {names}")

    async def _not_json(self) -> None:
        tenant = self.random.choice(TENANTS)
        good = json.dumps(self.body(tenant, self._prompt(tenant))).encode()
        cut = self.random.randrange(len(good))
        content = self.random.choice([
            good[:cut], good[:cut] + self.random.randbytes(3) + good[cut:], self.random.randbytes(200), b"[" * 50_000,
            b'{"a":' * 5000, b"NaN", b'{"model": "ada", "prompt": "\\ud800"}', good.replace(b"8", b"NaN"),
            b"\xef\xbb\xbf" + good, good + good, b'{"prompt": "a", "prompt": "b"}', b"null", b'"' + b"a" * 10000 + b'"',
        ])  # fmt: skip
        path = self.random.choice(["/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter"])
        response = await self.send(tenant, content, path)
        if response.status_code not in (200, 400, 403, 404, 503):
            self._fail("a broken body", response)

    async def _path(self) -> None:
        tenant = self.random.choice(TENANTS)
        method = self.random.choice(["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE", "X"])
        headers = {"Authorization": f"Bearer {key_of(tenant)}"} if self.random.random() < 0.7 else {}
        path = self.random.choice(PATHS)
        response = await self.client.request(method, self.server.url + path, headers=headers)
        self._check(tenant if headers else "nobody", response)
        if response.status_code == 200 and path == "/metrics":
            self._fail("metrics without leave", response)

    async def _wrong_key(self) -> None:
        value = self.random.choice([
            b"", b"Bearer", b"Bearer x", b"Basic YTpi", b"\xff\xfe", b"Bearer " + b"x" * 20000,
            b"Bearer " + hashlib.sha256(key_of("ada").encode()).hexdigest().encode(), b"Bearer *", b"bearer",
        ])  # fmt: skip
        body = self.body("ada", "Question: x")
        headers = {b"Authorization": value, b"Content-Type": b"application/json"}
        response = await self.client.post(
            f"{self.server.url}/v1/completions", content=json.dumps(body), headers=headers
        )
        self._check("nobody", response)
        if response.status_code != 401:
            self._fail("a wrong key", response)

    async def _load(self) -> None:
        tenant = self.random.choice((*TENANTS, "admin", "admin"))
        name = self.random.choice(["x", "", "ada", "tiny", "a/b", "..", "é", "x" * 200, "__base__", "default"])
        path = self.random.choice(LORA_PATHS)
        body: dict[str, Any] = {"lora_name": name, "lora_path": path, "load_inplace": False}
        if self.random.random() < 0.2:
            body[self.random.choice(list(body))] = self.random.choice(NASTY)
        response = await self.send(tenant, body, "/v1/load_lora_adapter")
        if tenant != "admin":
            if response.status_code not in (400, 403):
                self._fail("loading without the admin key", response)
            return
        if response.status_code == 200:
            if body["lora_path"] != "ada":
                self._fail("a folder that must not be loaded", response)
            await self.send("admin", {"lora_name": body["lora_name"]}, "/v1/unload_lora_adapter")
        elif response.status_code not in (400, 409):
            self._fail("loading", response)

    async def _raw(self) -> None:
        reader, writer = await asyncio.open_connection(self.server.host, self.server.port)
        try:
            writer.write(self.random.choice([*RAW, self.random.randbytes(300)]))
            await writer.drain()
            if self.random.random() < 0.5:
                writer.write_eof()
                answer = await asyncio.wait_for(reader.read(2000), 5)
                if answer.startswith(b"HTTP/1.1 5"):
                    self.failures.append(f"5xx for broken HTTP: {answer[:200]!r}")
        except (OSError, asyncio.TimeoutError):
            pass
        finally:
            writer.close()

    async def _leave(self) -> None:
        """Disconnects in the middle of a long answer or of the request."""
        tenant = self.random.choice(TENANTS)
        body = {**self.body(tenant, self._prompt(tenant)), "max_tokens": 300, "stream": self.random.random() < 0.7}
        content = json.dumps({**body, "ignore_eos": True}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key_of(tenant)}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        ).encode()
        reader, writer = await asyncio.open_connection(self.server.host, self.server.port)
        whole = head + content
        is_cut = self.random.random() < 0.3
        writer.write(whole[: self.random.randrange(len(whole))] if is_cut else whole)
        try:
            await writer.drain()
            if not is_cut and self.random.random() < 0.5:
                await asyncio.wait_for(reader.read(500), 10)
        except (OSError, asyncio.TimeoutError):
            pass
        finally:
            writer.close()

    async def _large(self) -> None:
        if self.random.random() < 0.9:
            return await self._ordinary()
        tenant = self.random.choice(TENANTS)
        size = self.random.choice([10**5, 10**6, 9 * 2**20])
        response = await self.send(tenant, {**self.body(tenant, "x"), "prompt": "a " * (size // 2)})
        if response.status_code != (413 if size > 8 * 2**20 else 400):
            self._fail("a large body", response)
        return None


async def fuzz(server: Server, requests: int, seed: int, at_once: int, show: Callable[[str], None]) -> dict[str, Any]:
    """Sends the requests and returns the result."""
    limits = httpx2.Limits(max_connections=at_once, max_keepalive_connections=at_once)
    async with httpx2.AsyncClient(timeout=120, limits=limits) as client:
        fuzzer = Fuzzer(server, client, seed)
        await fuzzer.learn()
        memory, sent = server.memory(), 0

        async def work() -> None:
            nonlocal sent
            while sent < requests and server.process.poll() is None:
                sent += 1
                if sent % 500 == 0:
                    show(f"{sent} requests, {len(fuzzer.failures)} failures, {server.memory()} MiB")
                kind = fuzzer.random.choice(fuzzer.kinds)
                try:
                    await kind()
                except httpx2.HTTPError as error:
                    # h11 answers some broken requests by closing the connection; that is by design in `raw` only.
                    fuzzer.failures.append(f"{kind.__name__}: no answer ({type(error).__name__} {error})")

        await asyncio.gather(*(work() for _ in range(at_once)))
        if server.process.poll() is not None:
            fuzzer.failures.append(f"The server ended with status {server.process.poll()}.")
        else:
            await _at_the_end(server, client, fuzzer)
        return {
            "requests": sent,
            "seed": seed,
            "statuses": dict(sorted(fuzzer.statuses.items())),
            "memory_mib": [memory, server.memory()],
            "failures": fuzzer.failures,
        }


async def _at_the_end(server: Server, client: httpx2.AsyncClient, fuzzer: Fuzzer) -> None:
    """Checks that the engine is empty, no adapter has changed, and the log has no text or key."""
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    left: list[str] = []
    for _ in range(200):
        text = (await client.get(f"{server.url}/metrics", headers=headers)).text
        gauges = ("milora_requests_waiting ", "milora_sequences_running ", "milora_cache_pages_used ")
        left = [line for line in text.splitlines() if line.startswith(gauges) and not line.endswith(" 0.0")]
        if not left:
            break
        await asyncio.sleep(0.1)
    if left:
        fuzzer.failures.append(f"left in the engine: {left}")
    if (await client.get(f"{server.url}/health")).json() != {"status": "ok"}:
        fuzzer.failures.append("not healthy at the end")
    for (tenant, prompt), expected in fuzzer.expected.items():
        text = (await fuzzer.send(tenant, fuzzer.body(tenant, prompt))).json()["choices"][0]["text"]
        if text != expected:
            fuzzer.failures.append(f"{tenant} has another text at the end: {text!r}, {expected!r}")
    log = "".join(server.log)
    for secret in ("secretof", "key-of-", "Question:"):
        if secret in log:
            line = next(line for line in server.log if secret in line)
            fuzzer.failures.append(f"{secret!r} in the log: {line[:300]}")
    for line in server.log:
        if not line.startswith("{"):
            fuzzer.failures.append(f"a line of the log is no JSON: {line[:300]}")


def main() -> int:
    """Starts a server, sends, reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=16, help="Requests at a time.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_adapters(Path(folder))
        server = Server(Path(folder))
        try:
            show = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
            result = asyncio.run(fuzz(server, options.requests, options.seed, options.at_once, show))
            if server.process.poll() is None:
                server.process.terminate()
                status = server.process.wait(60)
                if status != 0:
                    result["failures"].append(f"SIGTERM ended the server with status {status}")
        finally:
            server.process.kill()
    print(json.dumps({**result, "failures": result["failures"][:20], "failed": len(result["failures"])}, indent=1))
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
