"""What is said of how the set-up differs from the paper's."""

from __future__ import annotations

import pytest
from support.grids import TASKS, grid, record

from milora.paper.differences import differences, tuning_lines
from milora.paper.store import Results
from milora.tasks.bbh import Bbh
from milora.tasks.mmlu import Mmlu

EDGE = "\\* At the edge of what was tried: a value beyond it might be better."
ALWAYS = "A choice between two values is always at an edge of what was tried: a value beyond it might be better."


def test_tasks_say_how_they_differ_and_how_many_rows_the_paper_has() -> None:
    of = grid(sections=["table1"], only_methods=["lora"], tasks=("boolq", "piqa", "bundled-choice"), seeds=(0,))
    lines = differences(of, [record(run) for run in of.runs(Results(), lambda digest: True)])
    assert lines[1] == (
        "Tasks: boolq, piqa. Training and dev rows: boolq 4 and 2 (the paper: 9427 and none of its own); piqa 4 and 2 "
        "(the paper: 16000 and 2000)."
    )
    of_tasks = [line for line in lines if line.startswith(("boolq:", "piqa:"))]
    assert of_tasks == [
        "piqa: Tested on the public validation split of 1838 rows: the answers of the test rows, of which the paper "
        "counts 3000, were never published."
    ]
    of = grid(sections=["table1"], only_methods=["lora"], seeds=(0,))
    ours = differences(of, [record(run) for run in of.runs(Results(), lambda digest: True)])
    assert "bundled-choice 4 and 2; bundled-extraction 4 and 2." in ours[1], "the paper has none of them"


def test_mmlu_and_bbh_say_how_they_are_asked() -> None:
    lines = differences(grid(sections=["table3"], tasks=()), [])
    mmlu, bbh = (next(line for line in lines if line.startswith(f"{task}: ")) for task in ("mmlu", "bbh"))
    assert "after five solved questions" in mmlu
    assert Mmlu().shots == 5
    assert "without solved examples, and in at most 128 new tokens" in bbh
    assert (Bbh().shots, Bbh().max_new_tokens) == (0, 128)
    assert not any(line.startswith("mt-bench: ") for line in lines)


@pytest.mark.parametrize(
    ("perplexities", "taken", "notes"),
    [
        ({1e-3: 2.0, 2e-3: 1.0}, "| 0.002 |", [ALWAYS]),
        ({1e-3: 3.0, 2e-3: 2.0, 4e-3: 1.0}, "| 0.004 \\* |", [EDGE]),
        ({1e-3: 1.0, 2e-3: 2.0, 4e-3: 3.0}, "| 0.001 \\* |", [EDGE]),
        ({1e-3: 3.0, 2e-3: 1.0, 4e-3: 2.0}, "| 0.002 |", []),
        ({1e-3: 3.0}, "| 0.001 |", []),
    ],
)
def test_what_is_at_an_edge_of_what_was_tried(perplexities: dict[float, float], taken: str, notes: list[str]) -> None:
    of = grid(sections=["table1"], only_methods=["lora"], tasks=TASKS[:1], tune={"learning_rate": list(perplexities)})
    tries = [run for _, run in of.candidates(of.cells()[0])]
    found = {run.digest: record(run, dev_perplexity=perplexities[run.training["learning_rate"]]) for run in tries}
    lines = tuning_lines(of, Results(found))
    (row,) = (line for line in lines if line.startswith("| LoRA"))
    assert row.endswith(taken)
    assert [line for line in lines if line in (EDGE, ALWAYS)] == notes


def test_two_fields_with_two_values_each_are_two_choices_between_two() -> None:
    tune = {"learning_rate": [1e-3, 2e-3], "weight_decay": [0.0, 0.1]}
    of = grid(sections=["table1"], only_methods=["lora"], tasks=TASKS[:1], tune=tune)
    found = {run.digest: record(run) for _, run in of.candidates(of.cells()[0])}
    assert len(found) == 4
    lines = tuning_lines(of, Results(found))
    assert (ALWAYS in lines, EDGE in lines) == (True, False)


def test_what_has_no_order_has_no_edge() -> None:
    of = grid(
        sections=["table1"], only_methods=["lora"], tasks=TASKS[:1], tune={"gradient_checkpointing": [False, True]}
    )
    found = {run.digest: record(run) for _, run in of.candidates(of.cells()[0])}
    lines = tuning_lines(of, Results(found))
    assert any(line.startswith("| LoRA") and "False: 2.000, True: 2.000" in line for line in lines)
    assert not {ALWAYS, EDGE} & set(lines)


def test_what_has_no_right_answers_is_tuned_by_perplexity_and_says_so() -> None:
    of = grid(
        sections=["table1", "table3"],
        only_methods=["milora"],
        tasks=(),
        seeds=(0,),
        limits={"table1": {"tasks": ["boolq"]}},
        tune={"learning_rate": [1, 2, 3]},
        tune_by="accuracy",
        evaluation={"dev_rows": 4},
    )
    found = {}
    for run in of.runs(Results(), lambda digest: True):
        dev = {"perplexity": 2.5} if run.tasks == ("alpaca",) else {"accuracy": 0.5}
        found[run.digest] = record(run, dev=dict.fromkeys(run.tasks, dev))
    lines = tuning_lines(of, Results(found))
    assert any(line.startswith("| MiLoRA | boolq | 1: 50.0%, 2: 50.0%") for line in lines)
    assert any(line.startswith("| MiLoRA | alpaca | 1: 2.500, 2: 2.500") for line in lines)
    assert "Of alpaca, where no output is right or wrong, it is dev perplexity." in lines
