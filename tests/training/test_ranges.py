"""Values that cannot be intended are rejected before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from milora.training import DataArguments, MethodArguments, TrainingArguments
from milora_core.errors import MiLoraError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("per_device_train_batch_size", 0),
        ("per_device_train_batch_size", -4),
        ("per_device_train_batch_size", 2.5),
        ("per_device_train_batch_size", True),
        ("per_device_eval_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("total_train_batch_size", 0),
        ("bilevel_every", 0),
        ("max_length", 0),
        ("save_total_limit", 0),
        ("early_stopping_patience", -1),
        ("seed", -1),
        ("num_train_epochs", 0),
        ("num_train_epochs", float("nan")),
        ("max_steps", 0),
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("learning_rate", "fast"),
        ("activation_learning_rate", float("nan")),
        ("weight_decay", -0.1),
        ("warmup_steps", -1),
        ("max_grad_norm", float("nan")),
        ("label_smoothing_factor", 1.0),
        ("dense_share", 1.0),
        ("search_share", 0.0),
        ("search_share", 1.1),
        ("logging_steps", 0),
        ("eval_steps", 0),
        ("save_steps", float("nan")),
    ],
)
def test_a_number_out_of_range_is_named(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(MiLoraError, match=f"^{name} must be .*; found {value!r}"):
        TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("lora_dropout", float("nan")), ("lora_dropout", 1.0), ("lora_alpha", 0), ("load_balancing_coef", float("nan"))],
)
def test_so_is_a_methods(name: str, value: Any) -> None:
    for arguments in ({name: value}, {"settings": {name: value}}):
        with pytest.raises(MiLoraError, match=f"^{name} must be"):
            MethodArguments(**arguments)


@pytest.mark.parametrize(("name", "value"), [("dev_fraction", float("nan")), ("train_rows", 0), ("dev_rows", -1)])
def test_so_is_the_datas(name: str, value: Any) -> None:
    with pytest.raises(MiLoraError, match=f"^{name} must be"):
        DataArguments(backbone="tiny", **{name: value})


def test_edges_are_in_range(tmp_path: Path) -> None:
    values = {"learning_rate": 0.0, "search_share": 1.0, "early_stopping_patience": 0, "max_grad_norm": 0.0}
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, max_steps=-1, **values)
    assert arguments.search_share == 1.0


@pytest.mark.parametrize(("evaluates", "saves", "best"), [("no", "steps", False), ("steps", "no", False)])
def test_without_evaluations_or_checkpoints_none_is_best(
    tmp_path: Path, evaluates: str, saves: str, best: bool
) -> None:
    arguments = TrainingArguments(
        str(tmp_path), report_to="none", use_cpu=True, eval_strategy=evaluates, save_strategy=saves
    )
    assert arguments.load_best_model_at_end is best
    assert arguments.eval_on_start is (evaluates != "no")
