"""Learned-Adapter's search: dropped candidates, the remaining ones, saved files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.architectures import ARCHITECTURES, random_prompts
from torch import Tensor

from milora import MiLoraError
from milora.tuners.learned_adapter import LearnedAdapterConfig
from milora.tuners.learned_adapter.cell import DROPPED, Cell, SearchCell
from milora.tuners.learned_adapter.operations import OPERATIONS

INPUT_IDS = torch.tensor(random_prompts(2, 6, seed=1))
PATHS = [f"model.layers.{index}.{name}" for index in range(2) for name in ("self_attn", "mlp")]


def searching(seed: int = 0, **settings: Any) -> PeftModel:
    """An adapter with random tensors and random architecture weights."""
    model = get_peft_model(ARCHITECTURES["llama"](), LearnedAdapterConfig(**{"bottleneck": 16, **settings}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def logits_of(model: PeftModel) -> Tensor:
    return model(input_ids=INPUT_IDS).logits


def cells_of(model: PeftModel) -> dict[str, Any]:
    return {path: layer.bottleneck["default"].inner for path, layer in model.base_model.layers().items()}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_start_as_the_identity_and_keep_tokens_apart(name: str) -> None:
    operation = OPERATIONS[name](24)
    z = torch.randn(2, 5, 24)
    torch.testing.assert_close(operation(z), z)
    with torch.no_grad():
        for parameter in operation.parameters():
            parameter.normal_()
    torch.testing.assert_close(operation(z)[:, 2:3], operation(z[:, 2:3]))
    torch.testing.assert_close(operation(z[0]), operation(z)[0])


def test_the_weakest_of_each_choice_is_dropped() -> None:
    cell = SearchCell(8, ["relu", "gelu", "tanh"], ["identity", "mix", "gate", "scale"])
    with torch.no_grad():
        cell.activation_weights.copy_(torch.tensor([0.3, -0.2, 0.1]))
        # Among equal ones the last is dropped.
        cell.operation_weights.copy_(torch.tensor([0.1, 0.1, 0.5, 0.1]))
    assert (cell.rounds, cell.rounds_left, cell.is_decided) == (3, 3, False)
    left = []
    while not cell.is_decided:
        cell.drop_weakest()
        left.append([(weights > DROPPED / 2).nonzero()[:, 0].tolist() for weights in cell.architecture_weights])
    assert left == [[[0, 2], [0, 1, 2]], [[0], [0, 2]], [[0], [2]]]
    assert cell.found() == ("relu", "gate")
    z = torch.randn(3, 8)
    torch.testing.assert_close(cell(z), Cell("relu", cell.operations["gate"])(z), rtol=0, atol=0)


def test_a_dropped_candidate_has_no_part_and_does_not_come_back() -> None:
    cell = SearchCell(8, ["relu", "tanh"], ["identity", "mix", "gate"])
    cell.drop_weakest()
    optimizer = torch.optim.AdamW(cell.parameters(), lr=1.0, weight_decay=0.1)
    for _ in range(5):
        cell(torch.randn(4, 8)).square().sum().backward()
        # Zero instead of None: data-parallel training would wait for a missing gradient.
        assert cell.activation_weights.grad[1] == cell.operation_weights.grad[2] == 0
        assert cell.operations["gate"].weight.grad.abs().max() == 0
        optimizer.step()
        optimizer.zero_grad()
    assert cell.activation_weights.softmax(0)[1] == cell.operation_weights.softmax(0)[2] == 0
    assert cell.rounds_left == 1


def test_the_search_ends_with_an_architecture() -> None:
    model = searching()
    tuner = model.base_model
    expected = {
        path: {
            "activation": cell.activations[int(cell.activation_weights.argmax())],
            "operation": list(OPERATIONS)[int(cell.operation_weights.argmax())],
        }
        for path, cell in cells_of(model).items()
    }
    assert len({tuple(choice.values()) for choice in expected.values()}) > 1
    assert len(tuner.architecture_parameters()) == 8
    for left in (3, 2, 1):
        assert (tuner.is_searching, tuner.rounds_left, tuner.rounds) == (True, left, 3)
        assert model.peft_config["default"].architecture is None
        before = logits_of(model)
        tuner.drop_weakest()
        assert not torch.equal(logits_of(model), before)
    assert (tuner.is_searching, tuner.rounds_left, tuner.architecture_parameters()) == (False, 0, [])
    assert model.peft_config["default"].architecture == expected
    assert not [name for name, _ in model.named_parameters() if "architecture" in name or "operations" in name]
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("learned_adapter_" in name for name in trainable)
    with pytest.raises(MiLoraError, match="nothing left to drop"):
        tuner.drop_weakest()


def test_one_candidate_of_each_is_settled_in_one_round() -> None:
    model = searching(activations=["tanh"], operations=["identity"])
    assert model.base_model.rounds_left == 1
    before = logits_of(model)
    model.base_model.drop_weakest()
    torch.testing.assert_close(logits_of(model), before)
    assert model.peft_config["default"].architecture[PATHS[0]] == {"activation": "tanh", "operation": "identity"}


def test_resetting_starts_again() -> None:
    model = searching()
    for _ in range(3):
        model.base_model.drop_weakest()
    architecture = dict(model.peft_config["default"].architecture)
    model.base_model.reset_parameters()
    with torch.no_grad():
        assert torch.equal(logits_of(model), ARCHITECTURES["llama"]()(input_ids=INPUT_IDS).logits)
    assert model.peft_config["default"].architecture == architecture
    assert all(p.abs().max() > 0 for n, p in model.named_parameters() if n.endswith("default.down"))


@pytest.mark.parametrize("rounds", range(4))
def test_saved_at_any_time_of_the_search(tmp_path: Path, rounds: int) -> None:
    """The file stores the progress of the search; a loaded adapter finishes with the same result."""
    model = searching()
    for _ in range(rounds):
        model.base_model.drop_weakest()
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["architecture"] is None) == (rounds < 3)
    loaded = PeftModel.from_pretrained(ARCHITECTURES["llama"](), tmp_path, is_trainable=True)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert loaded.base_model.rounds_left == 3 - rounds
    for tuner in (model.base_model, loaded.base_model):
        while tuner.is_searching:
            tuner.drop_weakest()
    assert loaded.peft_config["default"].architecture == model.peft_config["default"].architecture
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_adapters_search_by_themselves() -> None:
    model = searching()
    model.add_adapter("other", LearnedAdapterConfig(bottleneck=8, activations=["relu", "tanh"], operations=["mix"]))
    default = model.base_model.architecture_parameters()
    model.set_adapter("other")
    assert model.base_model.rounds == 1
    model.base_model.drop_weakest()
    assert not model.base_model.is_searching
    assert len(model.peft_config["other"].architecture) == 4
    model.set_adapter("default")
    assert model.base_model.rounds_left == 3
    assert [id(p) for p in model.base_model.architecture_parameters()] == [id(p) for p in default]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activations": []}, "activations must be a list of one or several"),
        ({"activations": ["relu", "relu"]}, "activations must be a list"),
        ({"operations": ["convolution"]}, r"operations has 'convolution'; known are \['identity', 'scale'"),
        ({"architecture": {"a": {"activation": "relu"}}}, r"architecture\['a'\] must have an activation and an operat"),
        ({"architecture": {"a": {"activation": "relu", "operation": "gat"}}}, "did you mean 'gate'"),
    ],
)
def test_a_configuration_that_makes_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MiLoraError, match=message):
        LearnedAdapterConfig(**settings)


def test_an_architecture_of_another_backbone() -> None:
    choice = {"activation": "relu", "operation": "mix"}
    config = LearnedAdapterConfig(architecture=dict.fromkeys([*PATHS[:-1], "model.layers.7.mlp"], choice))
    with pytest.raises(MiLoraError, match=r"differ in \['model\.layers\.1\.mlp', 'model\.layers\.7\.mlp'\]"):
        get_peft_model(ARCHITECTURES["llama"](), config)
