"""Requirements that every method must meet on every kind of backbone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.adapted import Snapshot
from support.architectures import ARCHITECTURES, pad, random_prompts
from support.methods import METHODS, adapted, forward, fresh, randomize
from torch import Tensor

from milora import MiLoraError

FAMILIES = ["llama", "gemma2", "gpt2", "qwen3", "phi3", "opt", "falcon"]
# Quick one by one, but many, and mostly similar to the others.
SLOW = set(FAMILIES) - {"llama", "gpt2"}
TOKENS = torch.tensor(random_prompts(3, 8))
# Three prompt tokens, for the methods that read the prompt.
LABELS = TOKENS.masked_fill(torch.arange(8) < 3, -100)

pytestmark = pytest.mark.parametrize(
    ("method", "family"),
    [
        pytest.param(name, family, marks=[pytest.mark.slow] if family in SLOW else [])
        for name, method in METHODS.items()
        for family in FAMILIES
        if family not in method.refuses
    ],
)


@torch.no_grad()
def logits_of(model: Any, method: str, **arguments: Any) -> Tensor:
    return forward(model, method, TOKENS, **arguments).logits


@torch.no_grad()
def backbone_logits(model: Any) -> Tensor:
    return model(input_ids=TOKENS).logits


def generated(model: Any, method: str, tokens: Tensor = TOKENS, **settings: Any) -> Tensor:
    mask = settings.pop("attention_mask", torch.ones_like(tokens))
    arguments = settings.pop("arguments", METHODS[method].arguments(len(tokens)))
    return model.generate(
        input_ids=tokens, attention_mask=mask, max_new_tokens=5, do_sample=False, **arguments, **settings
    )


def gradients(model: PeftModel, method: str) -> dict[str, Tensor]:
    model.train()
    # Some methods draw their gates in training mode.
    torch.manual_seed(0)
    forward(model, method, TOKENS, labels=LABELS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_training_lowers_the_loss_and_leaves_the_backbone_alone(method: str, family: str) -> None:
    model = fresh(method, family)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    before = {name: p.clone() for name, p in model.named_parameters() if id(p) not in trained}
    if METHODS[method].starts_as_backbone:
        torch.testing.assert_close(logits_of(model, method), backbone_logits(ARCHITECTURES[family]()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    model.train()
    losses = []
    for _ in range(4):
        loss = forward(model, method, TOKENS, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_every_parameter_gets_a_gradient(method: str, family: str) -> None:
    model = adapted(method, family)
    missing = [n for n, gradient in gradients(model, method).items() if gradient is None or not gradient.any()]
    assert missing == []


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(method: str, family: str, use_reentrant: bool) -> None:
    expected = gradients(adapted(method, family), method)
    model = adapted(method, family)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    actual = gradients(model, method)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_adapters_load_as_they_were(method: str, family: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = adapted(method, family)
    expected = logits_of(model, method)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        ARCHITECTURES[family](), tmp_path, adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(logits_of(loaded, method), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    second = fresh(method, family)
    second.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    second.set_adapter("second")
    assert torch.equal(logits_of(second, method), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_bad_weights_leave_the_model_as_it_was(
    method: str, family: str, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    adapted(method, family).save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    sound = weights.read_bytes()
    tensors = load_file(weights)
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, weights, metadata={"format": "pt"})
    backbone = ARCHITECTURES[family]()
    before = Snapshot(backbone)
    with pytest.raises(MiLoraError, match="NaN"):
        PeftModel.from_pretrained(backbone, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    before.assert_unchanged(backbone)
    model = get_peft_model(backbone, METHODS[method].config()).eval()
    before = Snapshot(model)
    with pytest.raises(MiLoraError, match="NaN"):
        model.load_adapter(tmp_path, "other", low_cpu_mem_usage=low_cpu_mem_usage)
    before.assert_unchanged(model)
    weights.write_bytes(sound)
    model.load_adapter(tmp_path, "other", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("other")
    assert torch.equal(logits_of(model, method), logits_of(adapted(method, family), method))


def test_adapters_live_side_by_side_and_are_deleted(method: str, family: str) -> None:
    model = adapted(method, family)
    first = logits_of(model, method)
    model.add_adapter("second", METHODS[method].config())
    assert torch.equal(logits_of(model, method), first)
    model.set_adapter("second")
    randomize(model, method, seed=1)
    second = logits_of(model, method)
    assert not torch.allclose(second, first, atol=1e-3)
    model.set_adapter("default")
    assert torch.equal(logits_of(model, method), first)
    model.delete_adapter("second")
    assert torch.equal(logits_of(model, method), first)
    assert not any("second" in name for name, _ in model.named_parameters())


def test_disabled_is_the_backbone(method: str, family: str) -> None:
    model = adapted(method, family)
    expected = backbone_logits(ARCHITECTURES[family]())
    assert not torch.allclose(logits_of(model, method), expected, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, method), expected)
        assert torch.equal(backbone_logits(model), expected)
    assert not torch.equal(logits_of(model, method), expected)


def test_unload_gives_the_backbone_back(method: str, family: str) -> None:
    backbone = ARCHITECTURES[family]()
    bare = adapted(method, family).unload()
    assert list(bare.state_dict()) == list(backbone.state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in bare.modules())
    assert torch.equal(backbone_logits(bare), backbone_logits(backbone))


def test_merging_is_refused(method: str, family: str) -> None:
    model = adapted(method, family)
    expected = logits_of(model, method)
    with pytest.raises(MiLoraError, match="cannot be merged"):
        model.merge_and_unload()
    with pytest.raises(MiLoraError, match="cannot be merged"):
        model.merge_adapter()
    assert torch.equal(logits_of(model, method), expected)


def test_adapter_names_are_refused(method: str, family: str) -> None:
    model = adapted(method, family)
    with pytest.raises(MiLoraError, match="set_adapter"):
        logits_of(model, method, adapter_names=["default"] * len(TOKENS))
    with pytest.raises(MiLoraError, match="set_adapter"):
        generated(model, method, adapter_names=["default"] * len(TOKENS))


def test_copies_are_independent(method: str, family: str) -> None:
    model = adapted(method, family)
    expected = logits_of(model, method)
    twin = copy.deepcopy(model)
    assert torch.equal(logits_of(twin, method), expected)
    randomize(twin, method, seed=2)
    assert not torch.allclose(logits_of(twin, method), expected, atol=1e-3)
    twin.unload()
    assert torch.equal(logits_of(model, method), expected)


def test_a_cache_changes_nothing(method: str, family: str) -> None:
    model = adapted(method, family)
    assert torch.equal(generated(model, method), generated(model, method, use_cache=False))


def test_beams_follow_their_prompts(method: str, family: str) -> None:
    model = adapted(method, family)
    together = generated(model, method, num_beams=3, num_return_sequences=2)
    assert together.shape == (2 * len(TOKENS), TOKENS.shape[1] + 5)
    assert torch.equal(together, generated(model, method, num_beams=3, num_return_sequences=2, use_cache=False))
    for row, (alone, arguments) in enumerate(rows_alone(method, TOKENS)):
        expected = generated(model, method, alone, arguments=arguments, num_beams=3, num_return_sequences=2)
        assert torch.equal(together[2 * row : 2 * row + 2], expected)


def test_left_padding_changes_nothing(method: str, family: str) -> None:
    model = adapted(method, family)
    prompts = random_prompts(3, (3, 8), seed=5)
    tokens, mask = pad(prompts, "left")
    together = generated(model, method, tokens, attention_mask=mask)[:, tokens.shape[1] :]
    for row, (prompt, (_, arguments)) in enumerate(zip(prompts, rows_alone(method, tokens), strict=True)):
        alone = generated(model, method, torch.tensor([prompt]), arguments=arguments)
        assert torch.equal(together[row], alone[0, len(prompt) :])


def rows_alone(method: str, tokens: Tensor) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Each row as a separate batch, with its own arguments."""
    arguments = METHODS[method].arguments(len(tokens))
    return [
        (tokens[row : row + 1], {name: value[row : row + 1] for name, value in arguments.items()})
        for row in range(len(tokens))
    ]


def test_a_bfloat16_backbone(method: str, family: str) -> None:
    model = adapted(method, family, torch.bfloat16)
    output = logits_of(model, method)
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()
    assert not torch.equal(output, backbone_logits(ARCHITECTURES[family]().to(torch.bfloat16)))
    assert generated(model, method).shape == (len(TOKENS), TOKENS.shape[1] + 5)
    assert all(gradient is not None for gradient in gradients(model, method).values())
