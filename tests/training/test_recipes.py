"""The recipes: the command in their first line, and their settings."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from milora.training import DataArguments, MethodArguments, TrainingArguments
from milora_cli.train import parse

RECIPES = Path(__file__).parents[2] / "recipes"
COMMAND = "# milora train "
TRAINING = sorted(path for path in RECIPES.rglob("*.yaml") if path.read_text().startswith(COMMAND))

TABLE_5: dict[str, dict[str, Any]] = {
    "milora-1": {"pooler": "mean"},
    "milora-2": {"pooler": "last"},
    "milora-3": {"router_activation": "gelu"},
    "milora-4": {"router_activation": "relu|gelu"},
    "milora-5": {"router_activation": "gelu|relu"},
}


@pytest.mark.parametrize("recipe", TRAINING, ids=[str(path.relative_to(RECIPES)) for path in TRAINING])
def test_the_command_in_the_first_line(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parent)
    flags = shlex.split(recipe.read_text().splitlines()[0].removeprefix(COMMAND))
    assert Path(flags[flags.index("--config") + 1]).resolve() == recipe
    data, method, arguments = parse(flags)
    assert data.sources
    written = yaml.safe_load(recipe.read_text())
    for name, value in written.items():
        holder = next(part for part in (data, method, arguments) if hasattr(part, name))
        found = getattr(holder, name)
        assert found in (value, [value]), name


def test_there_are_recipes() -> None:
    assert len(TRAINING) >= 9


@pytest.mark.parametrize("name", TABLE_5)
def test_the_rows_of_table_5(name: str) -> None:
    _, method, _ = parse(
        ["--config", str(RECIPES / "table5" / f"{name}.yaml"), "--backbone", "tiny", "--task", "boolq"]
    )
    assert (method.method, method.overrides()) == ("milora", TABLE_5[name])


def test_the_papers_recipe_is_what_the_defaults_are() -> None:
    written = yaml.safe_load((RECIPES / "paper.yaml").read_text())
    config = MethodArguments(router_norm="tokens").to_config(None, steps=1)  # type: ignore[arg-type]
    arguments = TrainingArguments("out", use_cpu=True)
    data = DataArguments("tiny")
    for name, value in written.items():
        if name not in ("output_dir", "method"):
            holder = next(part for part in (config, arguments, data) if hasattr(part, name))
            assert getattr(getattr(holder, name), "value", getattr(holder, name)) == value, name


def test_the_batch_follows_the_number_of_rows() -> None:
    for rows, accumulation in ((9_999, 1), (10_000, 8)):
        arguments = TrainingArguments("out", use_cpu=True)
        arguments.set_accumulation(rows)
        assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (16, accumulation)


def test_a_batch_that_is_not_the_papers_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", 3)
    arguments = TrainingArguments("out", use_cpu=True)
    for rows, taken, papers in ((9_999, 48, 16), (10_000, 96, 128)):
        caplog.clear()
        arguments.gradient_accumulation_steps = 1
        arguments.set_accumulation(rows)
        assert arguments.rows_at_once * arguments.gradient_accumulation_steps == taken
        (record,) = caplog.records
        assert f"uses {taken} rows instead of the paper's {papers}" in record.getMessage()
    caplog.clear()
    arguments.total_train_batch_size = 96
    arguments.set_accumulation(9_999)
    assert (arguments.gradient_accumulation_steps, caplog.records) == (2, [])


@pytest.mark.parametrize(
    ("rows", "values", "steps"),
    [
        (100, {"num_train_epochs": 10}, 70),
        (100, {"num_train_epochs": 1, "gradient_accumulation_steps": 4}, 2),
        (100, {"num_train_epochs": 1, "dataloader_drop_last": True}, 6),
        (100, {"max_steps": 5}, 5),
        (3, {"num_train_epochs": 0.5}, 1),
    ],
)
def test_how_many_steps_a_run_makes(rows: int, values: dict[str, Any], steps: int) -> None:
    assert TrainingArguments("out", use_cpu=True, **values).optimizer_steps(rows) == steps
