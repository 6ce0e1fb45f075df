"""The engine with the Triton kernel: its texts equal those of the CPU path and of `generate` alone."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.interpreted import run_interpreted
from support.tenants import KINDS, Alone, engine_on, greedy, prompt_of, read, saved_adapters

from milora.serving.engine import slots
from milora.tuners.milora import packed
from milora_core.kernels.packed_lora import triton_operator
from milora_core.kernels.triton_support import has_triton, is_interpreted

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or not has_triton() or is_interpreted(), reason="needs a GPU and Triton"
)


def requests_for(folders: dict[str, Path], longest: int, tokens: int, each: int) -> list[Any]:
    """Requests of each adapter and the bare backbone, with prompts of different lengths."""
    generator = random.Random(3)
    kinds = [None, *folders] * each
    return [
        greedy(prompt_of(generator, generator.randrange(1, longest)), kind, tokens, return_route=kind is not None)
        for kind in kinds
    ]


def texts_and_routes(folders: dict[str, Path], requests: list[Any], device: str = "cpu") -> list[Any]:
    """Sends all requests at once, in steps of 24 tokens that mix chunks of prompts with single tokens."""
    with engine_on("llama", folders, device, step_tokens=24, most_texts=6) as engine:
        answers = [read(generation) for generation in [engine.submit(request) for request in requests]]
    return [(answer.tokens, answer.events[0].route) for answer in answers]


def assert_equal(found: list[Any], expected: list[Any], requests: list[Any]) -> None:
    for (tokens, route), (other_tokens, other_route), request in zip(found, expected, requests, strict=True):
        assert tokens == other_tokens, request.adapter
        is_routed = request.adapter not in (None, "lora", "dora")
        assert is_routed == (route is not None) == (other_route is not None), request.adapter
        if is_routed:
            assert (route.blocks, route.experts) == (other_route.blocks, other_route.experts)
            torch.testing.assert_close(route.gates, other_route.gates)
            torch.testing.assert_close(route.probabilities, other_route.probabilities)


@contextmanager
def without_reading() -> Iterator[None]:
    """Inside, reading a tensor on the host fails, because that would wait for a GPU."""

    def refuse(self: torch.Tensor, *args: Any) -> Any:
        raise AssertionError("The host reads a tensor.")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__"):
            patch.setattr(torch.Tensor, name, refuse)
        yield


def only_the_kernel(monkeypatch: pytest.MonkeyPatch, guard: Callable[[], Any]) -> None:
    """Fails if torch's operators compute an adapter, or if a router's decision is read during the pass."""

    def never(*args: Any) -> None:
        raise AssertionError("Torch's operators add an adapter.")

    def decide(self: Any, *args: Any) -> None:
        with guard():
            original(self, *args)

    original = packed.PackedTokens.decide
    monkeypatch.setattr(packed, "_add", never)
    monkeypatch.setattr(packed.PackedTokens, "decide", decide)


@pytest.mark.interpreted
def test_interpreted_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {name: KINDS[name] for name in ("milora-rank", "midora", "window", "late", "late-mean")}
    folders = saved_adapters(tmp_path, "llama", kinds)
    requests = requests_for(folders, longest=30, tokens=4, each=2)
    expected = texts_and_routes(folders, requests)
    monkeypatch.setenv("MILORA_NATIVE", "0")  # As on a GPU, routers use torch's operators.
    monkeypatch.setattr(slots, "packed_operator", triton_operator)
    only_the_kernel(monkeypatch, without_reading)
    assert_equal(texts_and_routes(folders, requests), expected, requests)


@pytest.mark.slow
@pytest.mark.skipif(not has_triton() or is_interpreted(), reason="needs Triton; this is the process that interprets it")
def test_in_tritons_interpreter() -> None:
    run_interpreted(__file__, passed=1)


@contextmanager
def without_waiting() -> Iterator[None]:
    """Inside, an operation that waits for the GPU fails."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = saved_adapters(tmp_path, "llama")
    requests = requests_for(folders, longest=40, tokens=12, each=3)
    alone = Alone("llama", folders, "cuda")
    expected = [[alone(request.adapter, request.prompt, 12)] for request in requests]
    only_the_kernel(monkeypatch, without_waiting)
    found = texts_and_routes(folders, requests, "cuda")
    assert [tokens for tokens, _ in found] == expected
