"""Gradients against the independent reference, and equal for every kind of backward pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.adapted import adapted as adapted_with_reference
from support.architectures import ARCHITECTURES, pad, random_prompts
from support.reference import ReferenceMiLora
from torch import Tensor


def adapted(family: str, **settings: Any) -> PeftModel:
    return adapted_with_reference(family, **settings).model


def contract_tensors(model: PeftModel, *, gradients: bool = False) -> dict[str, Tensor]:
    """The adapter's parameters or their gradients, named as in its file."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            key = name.replace(".default", "")
            key = key.removesuffix(".weight") if "magnitude" in key else key
            tensors[key] = parameter.grad if gradients else parameter.detach()
    return tensors


FAMILIES = ["llama", "gemma2", "qwen3", "gpt2", "gpt_neox", "phi3", "opt", "falcon"]


def supervised_batch(seed: int = 0) -> tuple[dict[str, Tensor], list[list[int]], list[int]]:
    """Three rows, padded on the right, with prompts of different lengths and completions of three tokens."""
    prompts = random_prompts(3, (3, 8), seed)
    rows = [prompt + completion for prompt, completion in zip(prompts, random_prompts(3, 3, seed + 99), strict=True)]
    input_ids, attention_mask = pad(rows, "right")
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    for row, prompt in enumerate(prompts):
        labels[row, : len(prompt)] = -100
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    return batch, rows, [len(prompt) for prompt in prompts]


def gradients(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("gate", ["hard", "softmax", "renormalized"])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_equations(family: str, gate: str, use_dora: bool) -> None:
    model = adapted(family, gate=gate, use_dora=use_dora, load_balancing_coef=0.3)
    model.train()
    batch, rows, lengths = supervised_batch()
    loss = model(**batch).loss
    loss.backward()
    tensors = {name: tensor.detach().clone().requires_grad_() for name, tensor in contract_tensors(model).items()}
    reference = ReferenceMiLora(ARCHITECTURES[family](), tensors, model.peft_config["default"].to_dict())
    # Completions have equal length, so the mean over tokens is the mean over rows.
    expected = torch.stack(
        [reference.loss(torch.tensor([row]), length) for row, length in zip(rows, lengths, strict=True)]
    ).mean() + 0.3 * reference.load_balancing(
        [torch.tensor([row[:length]]) for row, length in zip(rows, lengths, strict=True)]
    )
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    actual = contract_tensors(model, gradients=True)
    assert actual.keys() == tensors.keys()
    for name, tensor in tensors.items():
        wanted = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        # Relative to the tensor, because high powers in the rational activation lose digits in float32.
        tolerance = 5e-3 if "activation" in name else 5e-4
        assert (actual[name] - wanted).norm() <= tolerance * wanted.norm() + 1e-5, name
    moved = [name for name, tensor in actual.items() if tensor.abs().max() > 0]
    assert any("milora_router.projection" in name for name in moved)
    assert any("milora_router.activation" in name for name in moved)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(family: str, use_reentrant: bool) -> None:
    batch, _, _ = supervised_batch()
    plain = adapted(family, load_balancing_coef=0.3).train()
    plain_loss = plain(**batch).loss
    plain_loss.backward()
    model = adapted(family, load_balancing_coef=0.3).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    loss = model(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, plain_loss)
    assert_same(gradients(model), gradients(plain))


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_two_forwards_before_one_backward(checkpointing: bool | None) -> None:
    first, second = supervised_batch(1)[0], supervised_batch(2)[0]
    apart = adapted("llama").train()
    for batch in (first, second):
        apart(**batch).loss.backward()
    model = adapted("llama").train()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    (model(**first).loss + model(**second).loss).backward()
    assert_same(gradients(model), gradients(apart))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_retained_graph_counts_each_backward_once(checkpointing: bool) -> None:
    batch, _, _ = supervised_batch()
    once = adapted("llama").train()
    once(**batch).loss.backward()
    model = adapted("llama").train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(**batch).loss
    loss.backward(retain_graph=True)
    loss.backward()
    assert_same(gradients(model), {name: 2 * gradient for name, gradient in gradients(once).items()})


def test_micro_batches_with_num_items_add_up_to_the_whole_batch() -> None:
    """Trainer does not divide such losses: the language-model part is exact, the balance part is weighted by tokens."""
    batch, _, _ = supervised_batch()
    items = (batch["labels"][:, 1:] != -100).sum()
    whole = adapted("llama", load_balancing_coef=0.0).train()
    whole(**batch, num_items_in_batch=items).loss.backward()
    model = adapted("llama", load_balancing_coef=0.0).train()
    for row in range(3):
        model(
            **{name: tensor[row : row + 1] for name, tensor in batch.items()}, num_items_in_batch=items
        ).loss.backward()
    assert_same(gradients(model), gradients(whole))

    balanced = adapted("llama", load_balancing_coef=0.5).train()
    unbalanced = copy.deepcopy(balanced)
    unbalanced.peft_config["default"].load_balancing_coef = 0.0
    extra = []
    for row in range(3):
        part = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        difference = balanced(**part, num_items_in_batch=items).loss - unbalanced(**part, num_items_in_batch=items).loss
        extra.append(difference.item())
    alone = [
        (balanced(**part).loss - unbalanced(**part).loss).item()
        for part in ({name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(3))
    ]
    # All rows have equally many labels, so each counts a third.
    assert extra == pytest.approx([value / 3 for value in alone], abs=1e-5)


def test_the_balance_loss_is_added_in_training_only() -> None:
    batch, _, _ = supervised_batch()
    with_balance, without = adapted("llama", load_balancing_coef=0.5), adapted("llama", load_balancing_coef=0.0)
    assert with_balance.eval()(**batch).loss.item() == without.eval()(**batch).loss.item()
    assert with_balance.train()(**batch).loss.item() > without.train()(**batch).loss.item() + 0.4


@pytest.mark.parametrize("top_k", [1, 7])
def test_every_parameter_gets_a_gradient_and_idle_experts_a_zero(top_k: int) -> None:
    model = adapted("llama", top_k=top_k, load_balancing_coef=0.0).train()
    batch, _, _ = supervised_batch()
    one_row = {name: tensor[:1] for name, tensor in batch.items()}
    model(**one_row).loss.backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(parameter.grad is not None for parameter in trainable.values())
    layers = {name.rpartition(".lora_")[0] for name in trainable if ".lora_" in name}
    idle = {
        layer for layer in layers if all(p.grad.abs().max() == 0 for n, p in trainable.items() if n.startswith(layer))
    }
    assert len(idle) == len(layers) - top_k * 2


def test_all_experts_with_hard_gates_are_plain_lora() -> None:
    batch, _, _ = supervised_batch()
    model = adapted("llama", top_k=7, load_balancing_coef=0.0).train()
    lora = get_peft_model(
        ARCHITECTURES["llama"](), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    ).train()
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                parameter.copy_(own[name])
    ours, theirs = model(**batch), lora(**batch)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    ours.loss.backward()
    theirs.loss.backward()
    for name, parameter in lora.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(own[name].grad, parameter.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_training_routes_on_what_generation_routes_on(family: str) -> None:
    model = adapted(family)
    batch, rows, lengths = supervised_batch()
    with_labels = model.route(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])
    for row, length in enumerate(lengths):
        alone = model.route(torch.tensor([rows[row][:length]]))
        assert torch.equal(alone.gates[:, 0], with_labels.gates[:, row])
        torch.testing.assert_close(alone.probabilities[:, 0], with_labels.probabilities[:, row])


def test_bf16_autocast_keeps_the_routes_of_clear_cases_and_trains() -> None:
    model = adapted("llama").train()
    batch, _, _ = supervised_batch()
    exact = model.route(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model.route(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])
    # In another block: torch 2.7 reuses casts within a block that were made without gradients.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert rough.probabilities.dtype == torch.float32
    order = exact.probabilities.sort(dim=-1, descending=True).values
    clear = (order[..., 1] - order[..., 2]) > 0.02
    assert clear.any()
    assert torch.equal(rough.gates[clear], exact.gates[clear])
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_bare_backbone_runs_between_checkpointed_passes(use_reentrant: bool) -> None:
    """The reference of a KL penalty or of distillation: a pass of the training mode with the adapters disabled."""
    model = adapted("llama").train()
    batch, _, _ = supervised_batch()
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    loss = model(**batch).loss
    with torch.no_grad(), model.disable_adapter():
        bare = model(**batch).logits
    loss.backward()
    torch.testing.assert_close(bare, ARCHITECTURES["llama"]()(**batch).logits)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
