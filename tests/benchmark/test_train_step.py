"""`milora.benchmark.train`: seconds per step on a clock that the test controls, memory against known tensors."""

from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from milora.benchmark import TrainSettings, train_steps
from milora.benchmark.methods import build_backbone

# Values of A and B: r = 32, two blocks of q, k, v, o, gate, up, down.
LORA = 32 * 2 * (64 + 48 + 48 + 64 + 80 + 80 + 80)


@pytest.mark.parametrize(("checkpointing", "forwards"), [(False, 1), (True, 2)])
def test_seconds_and_memory_of_a_step(checkpointing: bool, forwards: int, tiny_shape: str, clock: Any) -> None:
    clock.slow(LlamaMLP, "forward", 3.0)
    clock.slow(torch.Tensor, "backward", 5.0)
    settings = TrainSettings(
        backbone=tiny_shape, device="cpu", dtype="float32", methods=("lora", "milora"), batch=1, tokens=2, rounds=2,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    rows = {row["method"]: row for row in train_steps(settings).rows}
    lora, milora = rows["lora"], rows["milora"]
    # Two blocks, run twice with checkpointing, and the backward pass.
    assert lora["seconds_per_step"] == milora["seconds_per_step"] == 2 * 3.0 * forwards + 5.0
    assert lora["trainable"] == LORA
    weights = sum(parameter.nbytes for parameter in build_backbone(settings.resolved()).parameters())
    # The adapter, AdamW's two moments, and the gradients. Two tokens have almost no activations.
    memory = lora["peak_memory_mib"] * 2**20 - weights
    assert 4 * 4 * LORA <= memory < 4 * 4 * LORA * 1.25
    assert lora["memory_ratios"] == {"milora": lora["peak_memory_mib"] / milora["peak_memory_mib"]}
    # MiLoRA adds routers of seven rows per block, and has gradients for the chosen experts only.
    assert milora["trainable"] > LORA + 2 * 7 * 32
    assert milora["memory_ratios"]["lora"] == pytest.approx(1, abs=0.1)
