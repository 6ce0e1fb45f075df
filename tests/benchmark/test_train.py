"""`milora.benchmark.train`: the passes of a step and its trained parameters, with and without bi-level training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from milora.benchmark import TrainSettings, decode_methods, train_steps
from milora.benchmark.methods import MeasuredMethod, build_backbone, build_method, check_names
from milora.benchmark.tables import cells
from milora.benchmark.train import Training, labelled_rows
from milora_core.errors import MiLoraError

CPU = torch.device("cpu")


def settings(shape: str, **values: Any) -> TrainSettings:
    return TrainSettings(backbone=shape, device="cpu", dtype="float32", batch=3, tokens=8, **values)


def test_bilevel_training_makes_a_pass_over_dev_rows_after_every_step(tiny_shape: str) -> None:
    passes: dict[str, list[tuple[bool, Tensor]]] = {}

    def build(name: str, backbone: Any, settings: Any) -> MeasuredMethod:
        method = build_method(name, backbone, settings)

        def note(module: Any, _: Any, inputs: dict[str, Tensor]) -> None:
            passes.setdefault(name, []).append((module.training, inputs["input_ids"]))

        method.model.register_forward_pre_hook(note, with_kwargs=True)
        return method

    result = train_steps(settings(tiny_shape, methods=("milora", "milora-bilevel"), rounds=2), build=build)
    # First step, warm-up, memory measurement, and two rounds.
    assert [training for training, _ in passes["milora"]] == [True] * 5
    assert [training for training, _ in passes["milora-bilevel"]] == [True, False] * 5
    trained, dev = (rows for _, rows in passes["milora-bilevel"][-2:])
    assert trained.shape == dev.shape == (3, 8)
    assert not torch.equal(trained, dev)
    rows = {row["method"]: row for row in result.rows}
    assert rows["milora-bilevel"]["trainable"] == rows["milora"]["trainable"]
    header, (_, bilevel) = cells(result.to_dict())
    ratio = rows["milora-bilevel"]["ratios"]["milora"]["median"]
    assert bilevel[header.index("/ milora")].startswith(f"{ratio:.3f} (")


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_theta_learns_at_its_own_rate_and_all_else_at_the_adapters(
    tiny_shape: str, gradient_checkpointing: bool
) -> None:
    resolved = settings(tiny_shape).resolved(training=True)
    backbone = build_backbone(resolved)
    rows, dev_rows = (labelled_rows(backbone, 3, 8, seed) for seed in (0, 1))
    method = build_method("milora-bilevel", backbone, resolved)
    training = Training(method, CPU, gradient_checkpointing, [dev_rows])
    adapter = {id(parameter) for parameter in training.parameters}
    before = {name: value.detach().clone() for name, value in method.model.named_parameters()}
    training.step(rows)
    # Adam's first step equals the learning rate for any gradient.
    for name, value in method.model.named_parameters():
        moved = (value - before[name]).abs().max().item()
        if id(value) not in adapter:
            assert moved == 0, name
        elif ".activation." in name:
            assert 5e-7 < moved < 2e-6, name
        elif "lora_" not in name:
            assert 5e-5 < moved < 2e-4, name


def test_it_is_for_training_alone() -> None:
    assert "milora-bilevel" in TrainSettings().methods
    assert "milora-bilevel" not in decode_methods(False)
    with pytest.raises(MiLoraError, match="milora bench train measures: name milora here"):
        check_names(["milora", "milora-bilevel"])
