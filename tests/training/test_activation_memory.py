"""What `milora train` chooses for a machine: gradient checkpointing by its memory, precision and attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from milora import MiLoraConfig
from milora.backbone.loading import load_backbone
from milora.training import DataArguments, TrainingArguments
from milora.training import activation_memory as memory
from milora.training import arguments as arguments_module
from milora.training.activation_memory import activations_fit, saved_bytes
from milora.training.training_run import _choose_attention, _choose_checkpointing

since_transformers_5_23 = pytest.mark.skipif(
    not hasattr(TrainingArguments, "activation_checkpointing"),
    reason="transformers has no activation_checkpointing yet",
)


def _adapted(config: Any) -> Any:
    backbone, _ = load_backbone("tiny", dtype="float32", device="cpu")
    return get_peft_model(backbone, config).eval()


@pytest.mark.parametrize("config", [MiLoraConfig(r=4), LoraConfig(r=4, target_modules="all-linear")])
def test_what_a_forward_keeps_is_what_it_allocates(config: Any) -> None:
    # Independent of saved tensors' sizes: memory that torch's allocator still holds after a forward pass.
    model = _adapted(config)
    counted = saved_bytes(model, 4, 64, bf16=False)

    ids = torch.arange(256).reshape(4, 64)
    with torch.profiler.profile(profile_memory=True) as profile:
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1)
    allocated = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    del output

    assert 0.8 * allocated < counted < 1.05 * allocated


def test_memory_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _adapted(MiLoraConfig(r=4))
    kept = saved_bytes(model, 8, 32, bf16=False)

    monkeypatch.setattr(memory, "available_memory", lambda: 4 * kept)
    assert activations_fit(model, 8, 32, bf16=False)
    monkeypatch.setattr(memory, "available_memory", lambda: kept)
    assert not activations_fit(model, 8, 32, bf16=False)


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "limit").write_text("3000\n")
    (tmp_path / "usage").write_text("1000\n")
    monkeypatch.setattr(memory, "_LIMITS", [(tmp_path / "limit", tmp_path / "usage")])
    assert memory.available_memory() == 2000

    (tmp_path / "limit").write_text("max\n")
    assert memory.available_memory() > 2**20


@pytest.mark.parametrize(
    ("asked", "memory_of_rows", "expected"),
    [
        ({}, 100, False),
        ({}, 1, True),
        ({"gradient_checkpointing": True}, 100, True),
        ({"gradient_checkpointing": False}, 1, False),
        pytest.param({"activation_checkpointing": True}, 100, True, marks=since_transformers_5_23),
        pytest.param({"activation_checkpointing": False}, 1, False, marks=since_transformers_5_23),
    ],
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
def test_checkpointing_is_left_out_where_memory_suffices_and_the_caller_wins(
    asked: dict[str, Any], memory_of_rows: int, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _adapted(MiLoraConfig(r=4))
    kept = saved_bytes(model, 8, 16, bf16=False)
    monkeypatch.setattr(memory, "available_memory", lambda: memory_of_rows * kept)
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=8, report_to="none", **asked
    )

    _choose_checkpointing(model, arguments, 16)

    assert arguments.gradient_checkpointing is expected
    assert arguments.to_dict().get("activation_checkpointing", expected) is expected


@pytest.mark.parametrize(
    ("asked", "bf16", "longest", "expected"),
    [
        (None, True, 256, "eager"),
        (None, True, 257, "sdpa"),
        (None, False, 16, "sdpa"),
        ("sdpa", True, 16, "sdpa"),
    ],
)
def test_short_rows_in_bf16_have_eager_attention(
    asked: str | None, bf16: bool, longest: int, expected: str, tmp_path: Path
) -> None:
    model, _ = load_backbone("tiny", dtype="float32", device="cpu")
    ids = torch.arange(24).view(2, 12)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, bf16=bf16, report_to="none")

    _choose_attention(model, DataArguments("tiny", attn_implementation=asked), arguments, longest)

    assert model.config._attn_implementation == expected
    with torch.no_grad():
        after = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(after[mask.bool()], before[mask.bool()], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("native", [True, False])
def test_bf16_follows_the_processor_and_the_caller(
    native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch 2.10 and later has this function.
    capabilities = {"avx512_bf16": native, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)

    assert arguments_module.multiplies_bf16() is native
    assert TrainingArguments(str(tmp_path), report_to="none").bf16 is native
    assert TrainingArguments(str(tmp_path), report_to="none", bf16=False).bf16 is False
    assert TrainingArguments(str(tmp_path), report_to="none", bf16=True, use_cpu=True).bf16 is True


def test_measuring_changes_nothing() -> None:
    model = _adapted(MiLoraConfig(r=4)).train()
    state = torch.random.get_rng_state()

    saved_bytes(model, 2, 16, bf16=True)

    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.base_model.routing_statistics()
