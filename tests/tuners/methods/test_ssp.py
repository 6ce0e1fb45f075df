"""SSP: its distribution and budget by independent formulas, the search, and the saved result."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from support.architectures import ARCHITECTURES, random_prompts
from torch import Tensor, nn

from milora import MiLoraError
from milora.tuners.ssp import SSPConfig, SSPModel
from milora.tuners.ssp.search import most_probable, sample_gates, shifted, solve_shift

FAMILIES = ["llama", "gpt2", "opt", "falcon"]
INPUT = torch.tensor(random_prompts(3, 7))


def adapted(family: str = "llama", **settings: Any) -> PeftModel:
    """A model in eval mode whose candidates all have an effect."""
    values = {"r": 2, "projection_dim": 3, "budget": 0.5, **settings}
    return fill(get_peft_model(ARCHITECTURES[family](), SSPConfig(**values))).eval()


def fill(model: PeftModel) -> PeftModel:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".ssp_." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def set_logits(model: PeftModel, logits: Tensor) -> None:
    with torch.no_grad():
        for parameter, values in zip(model.gate_parameters(), logits.view(-1, 2), strict=True):
            parameter.copy_(values)


def random_logits(model: PeftModel, scale: float = 2.0) -> Tensor:
    logits = scale * torch.randn(2 * len(model.gate_parameters()))
    set_logits(model, logits)
    return logits


def parameters_of(model: PeftModel) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if ".ssp_." in name and ".gate." not in name)


# ------------------------------------------------------------------------------ the distribution and the budget


@pytest.mark.parametrize("share", [0.001, 0.1, 0.4827, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_the_expected_number_of_parameters_is_the_budget(share: float, spread: float) -> None:
    logits, sizes = spread * torch.randn(300), torch.randint(10, 5000, (300,))
    budget = share * sizes.sum().item()
    zeta = solve_shift(logits, sizes, budget)
    expected = sum(n / (1 + math.exp(min(zeta - a, 700))) for a, n in zip(logits.tolist(), sizes.tolist(), strict=True))
    assert expected == pytest.approx(budget, rel=1e-3)


def test_a_budget_for_everything_keeps_everything() -> None:
    logits, sizes = torch.randn(5), torch.tensor([5, 4, 3, 2, 1])
    assert torch.sigmoid(shifted(logits, sizes, 15)).tolist() == [1.0] * 5
    leaf = logits.requires_grad_()
    shifted(leaf, sizes, 99).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


def test_the_gradient_knows_that_the_budget_is_kept() -> None:
    sizes, weights = torch.randint(1, 50, (6,)), torch.randn(6)
    start = torch.randn(6)
    budget = 0.4 * sizes.sum().item()

    def value(logits: Tensor) -> Tensor:
        return (weights.double() * torch.sigmoid(logits.double() - solve_shift(logits, sizes, budget))).sum()

    logits = start.clone().requires_grad_()
    p = torch.sigmoid(shifted(logits, sizes, budget))
    (weights * p).sum().backward()
    steps = 1e-4 * torch.eye(6, dtype=torch.float64)
    by_differences = [(value(start.double() + step) - value(start.double() - step)) / 2e-4 for step in steps]
    torch.testing.assert_close(logits.grad, torch.stack(by_differences).float(), rtol=1e-3, atol=1e-5)
    # The expected number of parameters stays at the budget, so it has no gradient.
    again = start.clone().requires_grad_()
    (sizes * torch.sigmoid(shifted(again, sizes, budget))).sum().backward()
    assert again.grad is not None
    assert again.grad.abs().max() < 1e-4 * budget


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_gates_are_binary_concrete(temperature: float) -> None:
    """The distribution function of Maddison et al. (2017, appendix B): P(z < x) = 1 / (1 + e^alpha (1/x - 1)^t)."""
    alpha = 0.7
    draws = sample_gates(torch.full((200_000,), alpha), temperature)
    for x in (0.1, 0.5, 0.9):
        expected = 1 / (1 + math.exp(alpha) * (1 / x - 1) ** temperature)
        assert (draws < x).float().mean().item() == pytest.approx(expected, abs=5e-3)
    # P(z > 1/2) is the gate's probability at every temperature.
    assert (draws > 0.5).float().mean().item() == pytest.approx(1 / (1 + math.exp(-alpha)), abs=5e-3)


def test_of_the_most_probable_those_that_fit() -> None:
    assert most_probable([0.9, 0.8, 0.7, 0.6], [5, 6, 5, 1], 11) == [0, 1]
    assert most_probable([0.9, 0.8, 0.7, 0.6], [5, 7, 5, 1], 11) == [0, 2, 3]
    assert most_probable([0.5, 0.5, 0.5], [4, 4, 4], 8) == [0, 1]
    assert most_probable([0.5], [4], 3) == []


# ------------------------------------------------------------------------------ forward passes


class Formula:
    """The backbone with `y = W x + b + z_lora (alpha / r) B A x + z_bitfit W' s` at each linear module, by hand."""

    def __init__(self, family: str, model: PeftModel, gates: dict[tuple[str, str], float], scaling: float) -> None:
        self.backbone = ARCHITECTURES[family]()
        tensors = {name.removeprefix("base_model.model."): p.detach() for name, p in model.named_parameters()}
        for path in {path for path, _ in gates}:
            part = {n.removeprefix(f"{path}.ssp_."): t for n, t in tensors.items() if n.startswith(f"{path}.ssp_.")}
            module = self.backbone.get_submodule(path)
            module.register_forward_hook(self.hook(path, part, gates, scaling))

    @staticmethod
    def hook(path: str, part: dict[str, Tensor], gates: dict[tuple[str, str], float], scaling: float) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if (path, "lora") in gates:
                low = args[0] @ part["lora.default.lora_A.weight"].T
                output = output + gates[path, "lora"] * scaling * low @ part["lora.default.lora_B.weight"].T
            if (path, "bitfit") in gates:
                bias = part["bitfit.default.projection"] @ part["bitfit.default.seed"]
                output = output + gates[path, "bitfit"] * bias
            return output

        return after

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return self.backbone(INPUT).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_while_searching_the_probabilities_are_the_gates_of_inference(family: str) -> None:
    model = adapted(family, lora_alpha=3)
    random_logits(model)
    expected = Formula(family, model, model.probabilities(), 1.5)()
    with torch.no_grad():
        torch.testing.assert_close(model(INPUT).logits, expected, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            assert (model(INPUT).logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fixed_structure_has_no_gates(family: str) -> None:
    model = adapted(family)
    random_logits(model)
    structure = fill_after(model)
    expected = Formula(family, model, dict.fromkeys(map(tuple, structure), 1.0), 2.0)()
    with torch.no_grad():
        torch.testing.assert_close(model(INPUT).logits, expected, rtol=1e-4, atol=1e-4)


def fill_after(model: PeftModel) -> list[list[str]]:
    structure: list[list[str]] = model.harden()
    fill(model)
    return structure


def test_training_draws_gates_anew_and_each_has_a_gradient() -> None:
    model = adapted().train()
    first, second = model(INPUT, labels=INPUT).loss, model(INPUT, labels=INPUT).loss
    assert first.item() != second.item()
    first.backward()
    assert all(parameter.grad is not None for parameter in model.gate_parameters())
    assert sum(parameter.grad.abs().sum() for parameter in model.gate_parameters()) > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(3)
        model(INPUT, labels=INPUT, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_new_adapter_changes_nothing() -> None:
    model = get_peft_model(ARCHITECTURES["llama"](), SSPConfig(r=2)).eval()
    with torch.no_grad():
        assert torch.equal(model(INPUT).logits, ARCHITECTURES["llama"]()(INPUT).logits)


# ------------------------------------------------------------------------------ the end of the search


def test_the_search_meets_its_budget_at_every_point() -> None:
    model = adapted(budget=0.3)
    everything = parameters_of(model)
    budget = model.peft_config["default"].budget
    assert budget == round(0.3 * everything)
    assert model.expected_parameters() == pytest.approx(budget, rel=1e-3)
    random_logits(model)
    assert model.expected_parameters() == pytest.approx(budget, rel=1e-3)


@pytest.mark.parametrize("budget", [400, 1500, 0.5, 1.0])
def test_hardening_keeps_the_most_probable_that_fit(budget: float) -> None:
    model = adapted(budget=budget)
    everything, logits = parameters_of(model), random_logits(model)
    names = list(model.probabilities())
    layers = list(model.base_model.layers())
    structure = model.harden()
    assert not model.is_searching
    assert model.gate_parameters() == []
    assert model.probabilities() == {}
    limit = everything if budget == 1.0 else everything / 2 if budget == 0.5 else budget
    assert 0.6 * limit < parameters_of(model) <= limit
    assert model.expected_parameters() == parameters_of(model)
    # By hand: in order of falling logits, every candidate that fits.
    sizes = {}
    for path in layers:
        module = model.base_model.model.get_submodule(path)
        sizes[path, "lora"] = 2 * (module.in_features + module.out_features)
        sizes[path, "bitfit"] = 3 * (module.out_features + 1)
    kept, spent = [], 0
    for index in logits.argsort(descending=True).tolist():
        if spent + sizes[names[index]] <= limit:
            spent += sizes[names[index]]
            kept.append(names[index])
    assert sorted(map(tuple, structure)) == sorted(kept)
    assert spent == parameters_of(model)
    # A module with no kept candidate is unchanged.
    for path in layers:
        there = any(path == of for of, _ in structure)
        module = model.base_model.model.get_submodule(path)
        assert hasattr(module, "ssp_") == there
        assert bool(module._forward_hooks) == there


def test_what_is_kept_starts_anew_in_the_same_parameters() -> None:
    model = adapted()
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters() if ".ssp_." in name}
    model.harden()
    after = {name: p for name, p in model.named_parameters() if ".ssp_." in name}
    assert 0 < len(after) < len(before)
    for name, parameter in after.items():
        assert parameter is before[name][0]
        assert parameter.requires_grad
        assert not torch.equal(parameter, before[name][1])
    with torch.no_grad():
        assert torch.equal(model(INPUT).logits, ARCHITECTURES["llama"]()(INPUT).logits)


def test_only_what_survived_is_saved_and_it_is_loaded_as_it_was(tmp_path: Path) -> None:
    model = adapted(budget=1500)
    random_logits(model)
    structure = fill_after(model)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["structure"], written["budget"], written["peft_type"]) == (structure, 1500, "SSP")
    assert sum(tensor.numel() for tensor in load_file(tmp_path / "adapter_model.safetensors").values()) <= 1500
    again = PeftModel.from_pretrained(ARCHITECTURES["llama"](), tmp_path).eval()
    assert not again.is_searching
    assert {n for n, _ in again.named_parameters()} == {n for n, _ in model.named_parameters()}
    with torch.no_grad():
        assert torch.equal(again(INPUT).logits, model(INPUT).logits)


def test_a_search_is_saved_and_goes_on(tmp_path: Path) -> None:
    model = adapted()
    random_logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(ARCHITECTURES["llama"](), tmp_path, is_trainable=True).eval()
    assert again.is_searching
    assert again.probabilities() == pytest.approx(model.probabilities())
    assert again.harden() == model.harden()


def test_two_adapters_search_apart() -> None:
    model = adapted()
    with torch.no_grad():
        expected = model(INPUT).logits
        model.add_adapter("other", SSPConfig(r=3, budget=0.2))
        model.set_adapter("other")
        structure = model.harden()
        assert model.peft_config["other"].structure == structure
        assert model.peft_config["default"].structure is None
        assert not model.is_searching
        model.set_adapter("default")
        assert model.is_searching
        assert torch.equal(model(INPUT).logits, expected)
        model.delete_adapter("other")
        assert torch.equal(model(INPUT).logits, expected)
        backbone = model.unload()
        assert torch.equal(backbone(INPUT).logits, ARCHITECTURES["llama"]()(INPUT).logits)
    assert not any("ssp_" in name for name, _ in backbone.named_modules())
    assert not backbone._forward_pre_hooks


def test_a_copy_searches_by_itself() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    twin.harden()
    assert isinstance(twin.base_model, SSPModel)
    assert model.is_searching
    with torch.no_grad():
        model(INPUT)


# ------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r must be at least 1"),
        ({"projection_dim": 0}, "projection_dim must be at least 1"),
        ({"budget": 0}, "budget must be"),
        ({"budget": float("nan")}, "budget must be"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"structure": []}, "an empty list"),
        ({"structure": [["model.layers.0.mlp.up_proj", "adapter"]]}, "structure must list"),
    ],
)
def test_values_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MiLoraError, match=message):
        SSPConfig(**settings)


def test_a_budget_that_nothing_fits() -> None:
    with pytest.raises(MiLoraError, match=r"budget=5 is below the .* parameters of the smallest candidate"):
        adapted(budget=5)


def test_a_structure_of_another_backbone() -> None:
    with pytest.raises(MiLoraError, match=r"for another backbone.*h\.9"):
        adapted(structure=[["transformer.h.9.mlp.c_fc", "lora"]])


def test_hardening_twice() -> None:
    model = adapted()
    model.harden()
    with pytest.raises(MiLoraError, match="is already fixed"):
        model.harden()
    with pytest.raises(MiLoraError, match="No adapter named 'other'"):
        model.harden("other")
