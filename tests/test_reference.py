"""Checks of the reference itself: values computed by hand, and identities that need no router."""

import math
from typing import Any

import pytest
import torch
from support.architectures import (
    ARCHITECTURES,
    BLOCKS,
    EXPERTS,
    UNEVEN_ARCHITECTURES,
    UNEVEN_EXPERTS,
    pad,
    random_prompts,
)
from support.reference import (
    Decision,
    ReferenceMiLora,
    activate,
    choose,
    expert_delta,
    gate_weights,
    load_balancing_loss,
    pool,
    random_adapter,
    rational,
    weight_of,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def config_for(experts: list[str] | dict[str, list[str]], **settings: Any) -> dict[str, Any]:
    defaults = {
        "r": 4,
        "lora_alpha": 8,
        "top_k": 3,
        "pooler": "attention",
        "router_activation": "rational",
        "rational_orders": [6, 5],
        "gate": "hard",
        "experts": experts,
        "use_dora": False,
        "use_rslora": False,
    }
    return {**defaults, **settings}


def reference_for(name: str, **settings: Any) -> ReferenceMiLora:
    backbone = ARCHITECTURES[name]()
    config = config_for(EXPERTS[name], **settings)
    return ReferenceMiLora(backbone, random_adapter(backbone, BLOCKS[name], config), config)


def prompt_of(length: int, seed: int = 0) -> Tensor:
    return torch.tensor(random_prompts(1, length, seed))


class TestByHand:
    hidden = torch.tensor([[1.0, 4.0], [3.0, 0.0], [2.0, 2.0]])

    def test_poolers(self) -> None:
        assert pool(self.hidden, "last").tolist() == [2.0, 2.0]
        assert pool(self.hidden, "mean").tolist() == [2.0, 2.0]
        assert pool(self.hidden, "max").tolist() == [3.0, 4.0]

    def test_attention_pooler(self) -> None:
        # Scores 0, 2 ln 2 and ln 2: weights 1/7, 4/7 and 2/7.
        hidden = torch.tensor([[0.0, 4.0], [2.0, 0.0], [1.0, 2.0]])
        pooled = pool(hidden, "attention", torch.tensor([[math.log(2), 0.0]]))
        torch.testing.assert_close(pooled, torch.tensor([10 / 7, 8 / 7]))

    def test_rational(self) -> None:
        # x = 2: (1 + 2*2 + 3*4) / (1 + |1*2 - 2*4|) = 17 / 7; x = -1: (1 - 2 + 3) / (1 + |-1 - 2|) = 2 / 4.
        value = rational(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, -2.0]))
        torch.testing.assert_close(value, torch.tensor([17 / 7, 0.5]))

    @pytest.mark.parametrize("name", ["gelu", "relu", "silu", "tanh"])
    def test_named_activations(self, name: str) -> None:
        x = torch.linspace(-4, 4, 41)
        torch.testing.assert_close(activate(x, name), getattr(torch.nn.functional, name)(x))

    def test_ties_take_the_lowest_index(self) -> None:
        assert choose(torch.tensor([0.2, 0.3, 0.2, 0.3]), 1) == [1]
        assert choose(torch.tensor([0.2, 0.3, 0.2, 0.3]), 3) == [1, 3, 0]
        assert choose(torch.full((5,), 0.2), 2) == [0, 1]

    def test_gates(self) -> None:
        p = torch.tensor([0.1, 0.6, 0.3])
        assert gate_weights(p, 2, "hard").tolist() == [0.0, 1.0, 1.0]
        torch.testing.assert_close(gate_weights(p, 2, "softmax"), torch.tensor([0.0, 0.6, 0.3]))
        torch.testing.assert_close(gate_weights(p, 2, "renormalized"), torch.tensor([0.0, 2 / 3, 1 / 3]))

    def test_straight_through_gradient_goes_to_the_chosen_alone(self) -> None:
        p = torch.tensor([0.1, 0.6, 0.3], requires_grad=True)
        (gate_weights(p, 2, "hard") * torch.tensor([5.0, 7.0, 11.0])).sum().backward()
        assert p.grad is not None
        assert p.grad.tolist() == [0.0, 7.0, 11.0]

    def test_load_balancing_loss(self) -> None:
        # Arg max: 0 (a tie), 0, 1. f = (2/3, 1/3), p = (0.5, 0.5): 2 * (1/3 + 1/6) = 1.
        rows = torch.tensor([[0.5, 0.5], [0.8, 0.2], [0.2, 0.8]])
        torch.testing.assert_close(load_balancing_loss(rows), torch.tensor(1.0))
        # All on one expert: f = (1, 0), p = (0.9, 0.1): 2 * 0.9.
        torch.testing.assert_close(load_balancing_loss(torch.tensor([[0.9, 0.1]] * 4)), torch.tensor(1.8))

    def test_expert_delta(self) -> None:
        module = nn.Linear(2, 2)
        with torch.no_grad():
            module.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
            module.bias.copy_(torch.tensor([100.0, 100.0]))
        lora_a, lora_b = torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0], [0.0]])
        x = torch.tensor([[1.0, 1.0]])
        # s = 2: s B A = [[0, 4], [0, 0]], so s B A x = (4, 0).
        assert expert_delta(module, x, lora_a, lora_b, 2.0, None).tolist() == [[4.0, 0.0]]
        # W + s B A = [[3, 4], [0, 1]], norms (5, 1), m = (10, 3): 10 / 5 * 7 - 3 = 11 and 3 / 1 * 1 - 1 = 2.
        delta = expert_delta(module, x, lora_a, lora_b, 2.0, torch.tensor([10.0, 3.0]))
        torch.testing.assert_close(delta, torch.tensor([[11.0, 2.0]]))

    def test_padding(self) -> None:
        input_ids, attention_mask = pad([[5, 6, 7], [8]], "left")
        assert input_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
        assert attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
        assert pad([[5, 6, 7], [8]], "right", 9)[0].tolist() == [[5, 6, 7], [8, 9, 9]]


ROUTERS = ("gate", "router.gate", "shared_expert_gate")


class TestArchitectures:
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_experts_are_the_linear_modules_of_every_block(self, name: str) -> None:
        for block in ARCHITECTURES[name]().get_submodule(BLOCKS[name]):
            linear = [path for path, module in block.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
            assert [path for path in linear if not path.endswith(ROUTERS)] == EXPERTS[name]

    @pytest.mark.parametrize("name", UNEVEN_ARCHITECTURES)
    def test_experts_of_uneven_blocks(self, name: str) -> None:
        model = UNEVEN_ARCHITECTURES[name]()
        for path, experts in UNEVEN_EXPERTS[name].items():
            block = model.get_submodule(path)
            assert [name for name, module in block.named_modules() if isinstance(module, nn.Linear)] == experts

    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_greedy_decoding_depends_on_prompt_route_and_adapter(self, name: str) -> None:
        reference = reference_for(name)
        prompts = [prompt_of(7, seed) for seed in range(4)]
        adapted = [reference.greedy(prompt, 6) for prompt in prompts]
        assert len({tuple(tokens) for tokens in adapted}) == len(prompts)
        assert sum(len(set(tokens)) for tokens in adapted) >= 2 * len(prompts)
        plain = [reference.backbone_greedy(prompt, 6) for prompt in prompts]
        assert sum(a != b for a, b in zip(adapted, plain, strict=True)) >= len(prompts) - 1
        routes = [reference.route(prompt).gates for prompt in prompts]
        assert any(not torch.equal(routes[0], route) for route in routes[1:])


class TestReference:
    @pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon", "afmoe"])
    @pytest.mark.parametrize("use_rslora", [False, True])
    def test_all_experts_chosen_is_the_backbone_with_merged_weights(self, name: str, use_rslora: bool) -> None:
        reference = reference_for(name, top_k=len(EXPERTS[name]), use_rslora=use_rslora)
        sequence = prompt_of(9)
        logits = reference.logits(sequence, 5)
        merged = ARCHITECTURES[name]()
        scaling = 8 / 2 if use_rslora else 8 / 4
        for index, block in enumerate(merged.get_submodule(BLOCKS[name])):
            for expert in EXPERTS[name]:
                key = f"base_model.model.{BLOCKS[name]}.{index}.{expert}."
                lora_a, lora_b = (reference.tensors[f"{key}lora_{letter}.weight"] for letter in "AB")
                weight_of(block.get_submodule(expert)).data.add_(lora_b @ lora_a, alpha=scaling)
        assert not torch.allclose(logits, reference.backbone_logits(sequence), atol=0.1)
        torch.testing.assert_close(logits, merged(sequence).logits, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_dora_with_the_plain_norm_and_no_low_rank_part_is_the_backbone(self, name: str) -> None:
        reference = reference_for(name, use_dora=True)
        sequence = prompt_of(9)
        moved = reference.logits(sequence, 5)
        for key, tensor in reference.tensors.items():
            if key.endswith("lora_B.weight"):
                tensor.zero_()
            elif key.endswith("lora_magnitude_vector"):
                path = key.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
                tensor.copy_(weight_of(reference.backbone.get_submodule(path)).norm(dim=1))
        assert not torch.allclose(moved, reference.backbone_logits(sequence), atol=0.1)
        torch.testing.assert_close(
            reference.logits(sequence, 5), reference.backbone_logits(sequence), atol=1e-4, rtol=1e-4
        )

    def test_the_first_router_by_hand(self) -> None:
        reference = reference_for("llama", pooler="mean", router_activation="relu", top_k=2)
        prompt = prompt_of(6)
        embedded = reference.backbone.get_input_embeddings()(prompt)[0]
        projection = reference.tensors["base_model.model.model.layers.0.milora_router.projection.weight"]
        expected = torch.softmax(projection @ embedded.mean(dim=0).relu(), dim=0)
        decision = reference.route(prompt)
        torch.testing.assert_close(decision.probabilities[0], expected)
        assert decision.gates.sum(dim=1).tolist() == [2.0, 2.0]

    def test_a_later_router_sees_the_adapted_block_before_it(self) -> None:
        reference = reference_for("llama", top_k=7)
        prompt = prompt_of(6)
        before = reference.route(prompt).probabilities
        reference.tensors["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"].zero_()
        after = reference.route(prompt).probabilities
        assert torch.equal(before[0], after[0])
        assert not torch.allclose(before[1], after[1])

    def test_tokens_after_the_prompt_do_not_enter_the_route(self) -> None:
        reference = reference_for("llama")
        sequence, other = prompt_of(10), prompt_of(10)
        other[0, 6:] += 1
        # The first six positions are causal and have the same route.
        torch.testing.assert_close(reference.logits(sequence, 6)[:, :6], reference.logits(other % 97, 6)[:, :6])
        assert not torch.equal(reference.route(sequence).probabilities, reference.route(sequence[:, :6]).probabilities)

    def test_a_given_decision_replaces_the_routers(self) -> None:
        reference = reference_for("llama")
        sequence = prompt_of(8)
        nothing = Decision(torch.zeros(2, 7), torch.full((2, 7), 1 / 7))
        assert torch.equal(reference.logits(sequence, 5, nothing), reference.backbone_logits(sequence))

    @pytest.mark.parametrize("gate", ["hard", "softmax", "renormalized"])
    def test_gradients_reach_the_chosen_experts_and_every_router(self, gate: str) -> None:
        reference = reference_for("llama", gate=gate, use_dora=True)
        for tensor in reference.tensors.values():
            tensor.requires_grad_()
        sequence = prompt_of(9)
        reference.loss(sequence, 5).backward()
        gates = reference.route(sequence[:, :5]).gates
        for key, tensor in reference.tensors.items():
            if ".milora_router." in key:
                assert tensor.grad is not None
                assert tensor.grad.abs().sum() > 0, key
            else:
                block, expert = key.removeprefix("base_model.model.model.layers.").split(".", 1)
                name = expert.removesuffix(".weight").rsplit(".", 1)[0]
                chosen = bool(gates[int(block), EXPERTS["llama"].index(name)])
                assert (tensor.grad is not None and bool(tensor.grad.abs().sum() > 0)) == chosen, key

    def test_gradient_of_the_router_by_finite_differences(self) -> None:
        reference = reference_for("llama", gate="softmax")
        sequence = prompt_of(9)
        key = "base_model.model.model.layers.0.milora_router.projection.weight"
        tensor = reference.tensors[key].requires_grad_()
        reference.loss(sequence, 5).backward()
        assert tensor.grad is not None
        direction = tensor.grad / tensor.grad.norm()
        with torch.no_grad():
            tensor.add_(direction, alpha=1e-3)
            above = reference.loss(sequence, 5)
            tensor.sub_(direction, alpha=2e-3)
            below = reference.loss(sequence, 5)
        assert (above - below).item() / 2e-3 == pytest.approx(tensor.grad.norm().item(), rel=0.02)

    def test_load_balancing_is_the_mean_over_blocks(self) -> None:
        reference = reference_for("llama")
        prompts = [prompt_of(n, n) for n in (4, 6, 9)]
        stacked = torch.stack([reference.route(prompt).probabilities for prompt in prompts])
        expected = (load_balancing_loss(stacked[:, 0]) + load_balancing_loss(stacked[:, 1])) / 2
        torch.testing.assert_close(reference.load_balancing(prompts), expected)

    @pytest.mark.parametrize("name", UNEVEN_ARCHITECTURES)
    def test_uneven_blocks(self, name: str) -> None:
        backbone = UNEVEN_ARCHITECTURES[name]()
        config = config_for(UNEVEN_EXPERTS[name], router_activation=["rational", "gelu"])
        reference = ReferenceMiLora(backbone, random_adapter(backbone, "model.layers", config), config)
        prompt = prompt_of(6)
        assert reference.greedy(prompt, 6) != reference.backbone_greedy(prompt, 6)
        decision = reference.route(prompt)
        assert (decision.gates > 0).sum(dim=1).tolist() == [3, 3]
        torch.testing.assert_close(decision.probabilities.sum(dim=1), torch.ones(2))

    def test_tensors_that_break_the_contract_are_refused(self) -> None:
        backbone = ARCHITECTURES["llama"]()
        config = config_for(EXPERTS["llama"])
        tensors = random_adapter(backbone, BLOCKS["llama"], config)
        tensors["base_model.model.model.layers.0.milora_router.pooler.bias"] = torch.zeros(1)
        with pytest.raises(ValueError, match=r"pooler\.bias"):
            ReferenceMiLora(backbone, tensors, config)
