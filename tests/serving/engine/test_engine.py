"""Each of the engine's texts equals `generate` alone, next to any other requests."""

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import ARCHITECTURES
from support.tenants import Alone, engine_on, greedy, prompt_of, read, saved_adapters

from milora.serving.engine.runner import Runner
from milora_core.errors import MiLoraError


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("backbone", "native"),
    [("llama", "1"), ("qwen3", "1"), ("gemma2", "1"), ("gemma3", "1"), ("llama", "0"), ("gemma2", "0")],
)
def test_staggered_requests_of_all_kinds_equal_generate(
    backbone: str, native: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILORA_NATIVE", native)
    folders = saved_adapters(tmp_path, backbone)
    alone = Alone(backbone, folders)
    generator = random.Random(backbone)
    kinds: list[Any] = [None, *folders]
    with engine_on(backbone, folders, step_tokens=16, most_texts=8) as engine:
        running = []
        for number in range(3 * len(kinds)):
            adapter = kinds[number % len(kinds)]
            prompt = prompt_of(generator, generator.randrange(1, 40))
            tokens = generator.randrange(1, 20)
            running.append((engine.submit(greedy(prompt, adapter, tokens)), adapter, prompt, tokens))
            time.sleep(generator.random() * 0.02)
        for generation, adapter, prompt, tokens in running:
            assert read(generation).tokens == [alone(adapter, prompt, tokens)], (adapter, len(prompt), tokens)
        statistics = engine.statistics()
    assert statistics.finished == len(running)
    assert statistics.cache_pages_used == 0


@pytest.mark.parametrize(
    ("dtype", "factor", "is_accepted"),
    [(torch.float32, 1.04, False), (torch.bfloat16, 1.04, True), (torch.bfloat16, 1.2, False)],
)
def test_a_backbone_with_different_logits_in_packed_passes_is_rejected(
    dtype: torch.dtype, factor: float, is_accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, rounding alone makes a difference of a few percent."""
    original = Runner._forward
    monkeypatch.setattr(Runner, "_forward", lambda self, *args: factor * original(self, *args))
    backbone = ARCHITECTURES["llama"]().to(dtype)
    if is_accepted:
        Runner(backbone, 2**22, 4).close()
    else:
        with pytest.raises(MiLoraError, match="logits in packed passes"):
            Runner(backbone, 2**22, 4)
