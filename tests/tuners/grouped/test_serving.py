"""Rows with different adapters in one forward pass: each equals the row alone, with one operator per module."""

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from support.adapted import adapted, add_adapter, assert_nothing_in_force, fill, tensors_for
from support.architectures import pad, random_prompts
from torch import Tensor, nn

from milora import MiLoraConfig, MiLoraError
from milora.tuners.grouped import stacks as grouped_serving

PROMPTS = random_prompts(6, (3, 9), seed=5)
INPUT_IDS, ATTENTION_MASK = pad(PROMPTS, "left")
BATCH = {"input_ids": INPUT_IDS, "attention_mask": ATTENTION_MASK}
NAMES = ["default", "wide", "__base__", "soft", "wide", "default"]


def tenants(name: str = "llama", **settings: Any) -> PeftModel:
    """Three adapters with different ranks, gates and numbers of experts."""
    model = adapted(name, **settings).model
    add_adapter(model, "wide", name, seed=7, top_k=3, r=6, lora_alpha=3, **settings)
    add_adapter(model, "soft", name, seed=9, top_k=1, r=2, gate="softmax", **settings)
    return model


@torch.no_grad()
def logits_of(model: nn.Module, rows: Any = slice(None), **settings: Any) -> Tensor:
    return model(**{name: tensor[rows] for name, tensor in BATCH.items()}, **settings).logits


def generate(model: PeftModel, rows: slice = slice(None), **settings: Any) -> list[list[int]]:
    inputs = {name: tensor[rows] for name, tensor in BATCH.items()}
    settings = {"max_new_tokens": 5, "do_sample": False, **settings}
    return model.generate(**inputs, **settings)[:, INPUT_IDS.shape[1] :].tolist()


def alone(model: PeftModel, names: list[str] = NAMES, **settings: Any) -> list[list[int]]:
    found = []
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                found += generate(model, slice(row, row + 1), **settings)
        else:
            model.set_adapter(name)
            found += generate(model, slice(row, row + 1), **settings)
    model.set_adapter("default")
    return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The input shapes of all calls of the operator."""
    shapes: list[tuple[int, ...]] = []
    own = grouped_serving.add_grouped_lora

    def counted(result: Tensor, x: Tensor, *rest: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return own(result, x, *rest)

    monkeypatch.setattr(grouped_serving, "add_grouped_lora", counted)
    return shapes


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_logits_of_each_row_are_those_of_the_row_alone(name: str, calls: list[Any]) -> None:
    model = tenants(name)
    mixed = logits_of(model, adapter_names=NAMES)
    layers = sum(isinstance(module, LoraLayer) for module in model.modules())
    assert calls == [call for call in calls if call[0] == len(NAMES)]
    assert len(calls) == layers
    for row, adapter in enumerate(NAMES):
        if adapter == "__base__":
            with model.disable_adapter():
                expected = logits_of(model, [row])
        else:
            model.set_adapter(adapter)
            expected = logits_of(model, [row])
        torch.testing.assert_close(mixed[row], expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_generated_rows_are_those_of_the_row_alone(name: str, settings: dict[str, Any]) -> None:
    model = tenants(name)
    assert generate(model, adapter_names=NAMES, **settings) == alone(model, **settings)
    assert_nothing_in_force(model)


def test_an_adapter_that_lacks_a_module(calls: list[Any]) -> None:
    model = adapted().model
    experts = ["self_attn.q_proj", "mlp.up_proj"]
    model.add_adapter("narrow", MiLoraConfig(r=4, lora_alpha=8, top_k=1, target_modules=["q_proj", "up_proj"]))
    fill(model, tensors_for("llama", 3, experts=experts), "narrow")
    model.eval()
    names = ["default", "narrow"] * 3
    assert generate(model, adapter_names=names) == alone(model, names)


class TestParameters:
    def test_they_are_views_of_the_stacks_and_in_memory_once(self) -> None:
        model = tenants()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        logits_of(model, adapter_names=NAMES)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        stack = next(iter(model.base_model.owner.stacks.values()))
        storages = {stack.layer.lora_A[name].weight.untyped_storage().data_ptr() for name in stack.slots}
        assert storages == {stack.lora_a.untyped_storage().data_ptr()}

    def test_weights_loaded_later_are_served(self) -> None:
        model = tenants()
        old = generate(model, adapter_names=NAMES)
        fill(model, tensors_for("llama", 21), "default")
        new = generate(model, adapter_names=NAMES)
        assert new != old
        assert new == alone(model)

    def test_replaced_parameters_are_served(self) -> None:
        model = tenants()
        generate(model, adapter_names=NAMES)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                linear = module.lora_B["wide"]
                linear.weight = nn.Parameter(linear.weight.detach() * -1)
        assert generate(model, adapter_names=NAMES) == alone(model)

    def test_layers_put_in_again_keep_their_weights(self) -> None:
        """Their parameters are views of the slots that they are copied to."""
        model = tenants()
        expected = generate(model, adapter_names=NAMES)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                again = nn.Linear(1, 1, bias=False)
                again.weight = module.lora_A["wide"].weight
                module.lora_A["wide"] = again
        assert generate(model, adapter_names=NAMES) == expected

    def test_a_rank_that_was_cut_keeps_what_is_left(self) -> None:
        model = tenants()
        generate(model, adapter_names=NAMES)
        cut = {}
        for path, module in model.named_modules():
            if isinstance(module, LoraLayer):
                a, b = module.lora_A["wide"], module.lora_B["wide"]
                a.weight = nn.Parameter(a.weight.detach()[2:])
                b.weight = nn.Parameter(b.weight.detach()[:, 2:])
                cut[path] = a.weight.clone(), b.weight.clone()
        assert generate(model, adapter_names=NAMES) == alone(model)
        for path, (a, b) in cut.items():
            layer: Any = model.get_submodule(path)
            assert torch.equal(layer.lora_A["wide"].weight, a)
            assert torch.equal(layer.lora_B["wide"].weight, b)

    def test_a_rank_that_was_cut_in_place(self) -> None:
        """The parameters keep their address but are shorter."""
        model = tenants()
        generate(model, adapter_names=NAMES)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                a, b = module.lora_A["wide"].weight, module.lora_B["wide"].weight
                a.data, b.data = a.data[:2], b.data[:, :2]
        assert generate(model, adapter_names=NAMES) == alone(model)

    def test_a_replaced_layer_is_served(self) -> None:
        model = tenants()
        generate(model, adapter_names=NAMES)
        attention = model.base_model.model.model.layers[0].self_attn
        attention.q_proj = copy.deepcopy(attention.q_proj)
        attention.q_proj.owner = model.base_model.owner
        for name in ("default", "wide", "soft"):
            attention.q_proj.lora_A[name].weight.data *= -3
        assert generate(model, adapter_names=NAMES) == alone(model)

    def test_moved_parameters_are_served(self) -> None:
        model = tenants()
        expected = logits_of(model, adapter_names=NAMES).double()
        model.double()
        torch.testing.assert_close(logits_of(model, adapter_names=NAMES), expected, rtol=1e-3, atol=1e-4)
        assert generate(model, adapter_names=NAMES) == alone(model)

    def test_what_has_not_changed_is_not_looked_into_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A caller's own decoding loop updates the stacks at every token."""
        model = tenants()
        logits_of(model, adapter_names=NAMES)
        monkeypatch.setattr(
            "milora.tuners.grouped.owner.stackable", lambda layer: pytest.fail("a layer was looked into again")
        )
        found = logits_of(model, adapter_names=NAMES)
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["wide"].weight.data.mul_(-5)
        assert not torch.equal(logits_of(model, adapter_names=NAMES), found)

    def test_adapters_come_and_go(self) -> None:
        model = tenants()
        generate(model, adapter_names=NAMES)
        model.delete_adapter("wide")
        with pytest.raises(MiLoraError, match="No adapter named"):
            generate(model, adapter_names=NAMES)
        add_adapter(model, "wide", seed=33, top_k=2, r=12)
        assert generate(model, adapter_names=NAMES) == alone(model)

    def test_another_adapter_moves_nothing_where_there_is_room(self) -> None:
        model = tenants()
        model.base_model.owner.capacity = 5
        logits_of(model, adapter_names=NAMES)
        stacks = model.base_model.owner.stacks
        places = {path: stack.lora_a.data_ptr() for path, stack in stacks.items()}
        add_adapter(model, "fourth", seed=40, r=3)
        names = ["fourth", *NAMES[1:]]
        assert generate(model, adapter_names=names) == alone(model, names)
        assert {path: stack.lora_a.data_ptr() for path, stack in stacks.items()} == places

    def test_copies_have_their_own(self) -> None:
        model = tenants()
        expected = generate(model, adapter_names=NAMES)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            for parameter in twin.parameters():
                parameter.data.zero_()
            assert generate(model, adapter_names=NAMES) == expected

    def test_a_saved_adapter_is_whole(self, tmp_path: Any) -> None:
        model = tenants()
        logits_of(model, adapter_names=NAMES)
        model.save_pretrained(tmp_path, selected_adapters=["soft"])
        model.load_adapter(str(tmp_path / "soft"), "again")
        model.eval()
        names = ["soft"] * 6
        assert generate(model, adapter_names=["again"] * 6) == generate(model, adapter_names=names)


class TestOneAdapterAfterTheOther:
    def test_gradients(self) -> None:
        model = tenants()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        logits = model(**BATCH, adapter_names=NAMES).logits
        torch.testing.assert_close(logits, logits_of(model, adapter_names=NAMES), rtol=1e-4, atol=1e-5)
        logits.sum().backward()
        layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
        assert layer.lora_A["wide"].weight.grad is not None

    def test_midora_rows_with_gradients_and_soft_gates(self) -> None:
        """Each row's gradients equal those of the row alone, in its adapter and in the router that gates it."""
        model = tenants()
        add_adapter(model, "midora", seed=3, use_dora=True, gate="softmax")
        names = ["midora", "wide", "__base__", "midora", "soft", "wide"]
        model.requires_grad_(False)
        trained = {
            name: parameter.requires_grad_()
            for name, parameter in model.named_parameters()
            if any(f".{adapter}" in name for adapter in ("midora", "wide", "soft"))
        }

        def gradients(rows: list[int], **settings: Any) -> dict[str, Tensor]:
            model.zero_grad()
            logits = model(**{name: tensor[rows] for name, tensor in BATCH.items()}, **settings).logits
            logits.square().sum().backward()
            return {
                name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
                for name, parameter in trained.items()
            }

        together = gradients(list(range(6)), adapter_names=names)
        expected = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
        for row, name in enumerate(names):
            if name != "__base__":
                model.base_model.set_adapter(name)
                for parameter in trained.values():
                    parameter.requires_grad_()
                for each, gradient in gradients([row]).items():
                    expected[each] += gradient
        assert any(gradient.any() for name, gradient in expected.items() if "projection.midora" in name)
        assert any(gradient.any() for name, gradient in expected.items() if "lora_A.midora" in name)
        for each, gradient in expected.items():
            torch.testing.assert_close(together[each], gradient, rtol=1e-3, atol=1e-4, msg=each)

    def test_a_layer_that_is_called_with_further_arguments(self) -> None:
        """The base layer gets them, as in PEFT; the rows keep their adapters."""

        class Scaled(nn.Linear):
            def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
                return super().forward(x) * factor

        model = tenants()
        add_adapter(model, "midora", seed=3, use_dora=True)
        layer = model.base_model.model.model.layers[1].mlp.gate_proj
        layer.base_layer.__class__ = Scaled
        own = type(layer)
        names = ["midora", "wide", "__base__", "midora", "soft", "default"]
        layer.register_forward_pre_hook(lambda module, args: (*args, 2.0))
        assert type(layer) is own
        mixed = logits_of(model, adapter_names=names)
        for row, name in enumerate(names):
            if name != "__base__":
                model.set_adapter(name)
                torch.testing.assert_close(mixed[row], logits_of(model, [row])[0], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
    def test_midora_rows_beside_others(self, name: str) -> None:
        model = tenants(name)
        add_adapter(model, "midora", name, seed=3, use_dora=True)
        add_adapter(model, "another", name, seed=4, use_dora=True, top_k=1)
        names = ["midora", "wide", "__base__", "another", "midora", "soft"]
        assert generate(model, adapter_names=names) == alone(model, names)
        assert generate(model, adapter_names=names, num_beams=2) == alone(model, names, num_beams=2)
        assert generate(model, adapter_names=NAMES) == alone(model)

    def test_rows_without_an_adapter_beside_midora_are_the_backbones(self) -> None:
        model = tenants()
        add_adapter(model, "midora", seed=3, use_dora=True)
        names = ["midora", *["__base__"] * 5]
        with model.disable_adapter():
            bare = logits_of(model)
        mixed = logits_of(model, adapter_names=names)
        assert not torch.equal(mixed[0], bare[0])
        torch.testing.assert_close(mixed[1:], bare[1:], rtol=1e-5, atol=1e-6)


def test_nothing_is_left_in_place_afterwards() -> None:
    model = tenants()
    generate(model, adapter_names=NAMES)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_threads_serve_different_tenants() -> None:
    model = tenants()
    orders = [NAMES, NAMES[::-1], ["soft"] * 6]
    expected = [alone(model, names) for names in orders]
    found: dict[int, Any] = {}

    def run(place: int) -> None:
        for _ in range(3):
            found[place] = generate(model, adapter_names=orders[place])

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(orders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[place] for place in range(len(orders))] == expected
    assert not any("forward" in module.__dict__ for module in model.modules())
