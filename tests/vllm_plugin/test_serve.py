"""`vllm serve` in a separate process, used through the `openai` client."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from support.reference import random_adapter
from tenants import (
    PLAIN,
    SETTINGS,
    Job,
    adapter_config,
    expect,
    make_backbone,
    random_tokens,
    write_adapter,
)

SECONDS_TO_START = 240
SERVED = ["attention", "window", "late", "late_mean", PLAIN]


@contextmanager
def serve(folder: Path, *options: str, **environment: str) -> Iterator[str]:
    """Runs `vllm serve` on a folder's backbone and returns its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder / "backbone")),
        *("--served-model-name", "backbone", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"),
        *("--max-num-seqs", "8", "--max-num-batched-tokens", "280", "--block-size", "32"),
        *("--enable-lora", "--max-loras", "8", "--max-lora-rank", "8"),
        *("--host", "127.0.0.1", "--port", str(port), *options),
    ]
    defaults = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO", "OMP_NUM_THREADS": "1"}
    log = folder / f"serve-{port}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env={**os.environ, **defaults, **environment}, stdout=file, stderr=file, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + SECONDS_TO_START
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < end, log.read_text()[-4000:]
            try:
                if httpx.get(f"{address}/health", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.3)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def modules(folder: Path) -> list[str]:
    return ["--lora-modules", *(f"{name}={folder / name}" for name in SERVED)]


def client_of(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300)


def ask(client: openai.OpenAI, job: Job, stream: bool = False, **extra: Any) -> str:
    """The text that follows a prompt."""
    arguments: dict[str, Any] = {
        "model": job.adapter or "backbone",
        "prompt": job.prompt,
        "max_tokens": job.tokens,
        "temperature": 0,
        "extra_body": {"ignore_eos": True, **extra},
    }
    if stream:
        return "".join(part.choices[0].text for part in client.completions.create(stream=True, **arguments))
    return client.completions.create(**arguments).choices[0].text


def text_of(tokens: list[int]) -> list[str]:
    # The unknown word is a special token, which texts leave out.
    return [f"w{token}" for token in tokens if token != 0]


def make_jobs(seed: int) -> list[Job]:
    generator = torch.Generator().manual_seed(seed)
    return [Job(name, random_tokens(length, generator)) for name in [*SERVED, None] for length in (7, 90, 130)]


def check_all(address: str, jobs: list[Job]) -> None:
    client = client_of(address)
    with ThreadPoolExecutor(len(jobs)) as pool:
        texts = list(pool.map(lambda numbered: ask(client, numbered[1], numbered[0] % 2 == 0), enumerate(jobs)))
    assert [text.split() for text in texts] == [text_of(job.expected) for job in jobs]


def test_many_clients_at_once_streamed_and_not(llama: Path) -> None:
    jobs = make_jobs(21)
    expect(llama, jobs)
    adapters = llama / "adapters"
    adapters.mkdir()
    config = json.loads((llama / "max" / "adapter_config.json").read_text())
    shutil.copytree(llama / "max", adapters / "found")
    shutil.copytree(llama / "max", adapters / "dora")
    (adapters / "dora" / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_LORA_RESOLVER_CACHE_DIR": str(adapters)}
    with serve(llama, *modules(llama), **environment) as address:
        client = client_of(address)
        assert {model.id for model in client.models.list()} == {"backbone", *SERVED}
        for _ in range(2):
            check_all(address, jobs)

        # Loading and unloading an adapter.
        job = Job("mean", jobs[1].prompt)
        expect(llama, [job])
        body = {"lora_name": "mean", "lora_path": str(llama / "mean")}
        assert httpx.post(f"{address}/v1/load_lora_adapter", json=body, timeout=60).status_code == 200
        assert ask(client, job).split() == text_of(job.expected)
        in_place = httpx.post(f"{address}/v1/load_lora_adapter", json={**body, "load_inplace": True}, timeout=60)
        assert in_place.status_code >= 400
        assert "unload it" in in_place.text
        body.pop("lora_path")
        assert httpx.post(f"{address}/v1/unload_lora_adapter", json=body, timeout=60).status_code == 200
        with pytest.raises(openai.NotFoundError):
            ask(client, job)

        # The resolver finds the adapter by name in its folder.
        found = Job("max", jobs[2].prompt)
        expect(llama, [found])
        found.adapter = "found"
        config["base_model_name_or_path"] = str(llama / "backbone")
        assert ask(client, found).split() == text_of(found.expected)
        with pytest.raises(openai.NotFoundError):
            ask(client, Job("../mean", jobs[0].prompt))
        refused = httpx.post(
            f"{address}/v1/load_lora_adapter",
            json={"lora_name": "dora", "lora_path": str(adapters / "dora")},
            timeout=60,
        )
        assert refused.status_code >= 400
        assert "use_dora" in refused.text

        # Beam search, and an error that fails only its own request.
        assert len(ask(client, jobs[0], use_beam_search=True, n=2).split()) == jobs[0].tokens
        with pytest.raises(openai.BadRequestError, match="milora_prompt_tokens"):
            ask(client, jobs[0], vllm_xargs={"milora_prompt_tokens": 99})
        check_all(address, jobs)


def test_200_requests_of_20_tenants_that_arrive_one_after_the_other(llama: Path) -> None:
    # More tenants than slots, so adapters are evicted and loaded again while requests run.
    backbone = make_backbone("llama")
    tenants = []
    for number in range(20):
        settings = list(SETTINGS.values())[number % len(SETTINGS)]
        config = adapter_config(llama, **settings)
        tenants.append(f"tenant{number}")
        write_adapter(llama / tenants[-1], config, random_adapter(backbone, "model.layers", config, 200 + number))
    generator = torch.Generator().manual_seed(23)
    lengths = torch.randint(5, 140, (200,), generator=generator).tolist()
    jobs = [Job(tenants[i % 20], random_tokens(length, generator), tokens=8) for i, length in enumerate(lengths)]
    expect(llama, jobs)
    starts = torch.rand(200, generator=generator).mul(10).tolist()

    with serve(llama, "--lora-modules", *(f"{name}={llama / name}" for name in tenants)) as address:
        client = client_of(address)

        def run(number: int) -> str:
            time.sleep(starts[number])
            return ask(client, jobs[number], stream=number % 2 == 0)

        with ThreadPoolExecutor(len(jobs)) as pool:
            texts = list(pool.map(run, range(len(jobs))))

    assert [text.split() for text in texts] == [text_of(job.expected) for job in jobs]


def test_tensor_parallel(llama: Path) -> None:
    jobs = make_jobs(22)
    expect(llama, jobs)
    # vLLM binds each worker to its own NUMA node, but the machine may have only one.
    with serve(llama, "--tensor-parallel-size", "2", *modules(llama), VLLM_CPU_OMP_THREADS_BIND="nobind") as address:
        for _ in range(2):
            check_all(address, jobs)
