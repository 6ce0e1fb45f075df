"""Runs in a folder that a report does not ask for."""

from __future__ import annotations

from typing import Any

from support.grids import TASKS, grid, record

from milora.paper.grid import Grid
from milora.paper.store import Record, Results
from milora.paper.usage import unused_lines


def records(of: Grid, found: Results | None = None) -> dict[str, Record]:
    return {run.digest: record(run) for run in of.runs(found or Results(), lambda digest: True)}


def one_grid(**flags: Any) -> Grid:
    return grid(**{"sections": ["table1"], "only_methods": ["lora"], "tasks": TASKS[:1], **flags})


def told(of: Grid, found: dict[str, Record]) -> list[str]:
    results = Results(found)
    return unused_lines(of, results)


START = "This report makes no use of {} in `results.jsonl`, which its settings do not ask for: "


def test_nothing_is_said_where_all_runs_are_used() -> None:
    of = one_grid(seeds=(0, 1, 2))
    assert told(of, records(of)) == []
    assert told(of, {}) == []


def test_runs_are_told_by_method_and_by_what_sets_them_apart() -> None:
    of = one_grid(seeds=(0, 1), training={"learning_rate": 1e-3, "max_steps": 5})
    longer = one_grid(seeds=(0, 1), training={"learning_rate": 5e-3, "max_steps": 5, "bilevel_every": 4})
    others = {
        **records(longer),
        **records(one_grid(seeds=(7,), tasks=TASKS[1:], training={"learning_rate": 1e-3})),
        **records(one_grid(seeds=(0,), evaluation={"beams": 1}, training={"learning_rate": 1e-3, "max_steps": 5})),
        **records(one_grid(seeds=(0,), only_methods=["ssp"])),
    }
    assert told(of, {**records(of), **others}) == [
        START.format("5 finished runs") + "LoRA: training.learning_rate 0.005 and training.bilevel_every 4 (2); LoRA: "
        "trained on bundled-extraction, seed 7 and no training.max_steps (1); LoRA: evaluation.beams 1 (1); SSP, which "
        "is not reported (1)."
    ]


def test_a_value_that_was_tried_and_is_not_taken_for_this_task_is_told_with_the_task() -> None:
    tune = {"learning_rate": [1e-3, 2e-3]}
    of = one_grid(seeds=(0, 1), tune=tune)
    tries = records(of)
    tries = records(of, Results(tries))
    assert len(tries) == 2 + 1
    # A second seed at the rate that was not taken, as after a try that came out otherwise.
    taken = next(one["training"]["learning_rate"] for one in tries.values() if one["seed"] == 1)
    (other,) = {1e-3, 2e-3} - {taken}
    of_other = records(one_grid(seeds=(1,), training={"learning_rate": other}))
    assert told(of, {**tries, **of_other}) == [
        START.format("1 finished run") + f"LoRA: trained on bundled-choice and training.learning_rate {other:g} (1)."
    ]
