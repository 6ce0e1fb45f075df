"""Rows that came to nothing, counted by hand."""

from __future__ import annotations

import csv
import io
from typing import Any

from support.grids import grid, record

from milora.paper.grid import Grid
from milora.paper.lost_rows import lost_row_notes
from milora.paper.runs import Run
from milora.paper.statistics import Measurements
from milora.paper.store import Results
from milora.paper.tables import section_table


def score(rows: int = 10, unparsed: int = 0, no_room: int = 0) -> dict[str, Any]:
    return {"accuracy": 0.5, "rows": rows, "correct": rows // 2, "unparsed": unparsed, "no_room": no_room}


def measured(of: Grid, values: Any) -> Measurements:
    """Finished runs, with what `values` says of each."""
    runs = of.runs(Results(), lambda digest: True)
    return Measurements(of, Results({run.digest: record(run, **values(run)) for run in runs}))


def test_what_is_lost_is_said_by_task_and_row_and_stands_in_the_csv() -> None:
    of = grid(sections=["table1"], only_methods=["lora", "dora", "milora"], tasks=("boolq", "piqa"))

    def values(run: Run) -> dict[str, Any]:
        (task,) = run.tasks
        unparsed = {("lora", "piqa"): 1 + run.seed, ("dora", "piqa"): 3 * run.seed, ("milora", "boolq"): 1}
        tests = {task: score(10, unparsed.get((run.method, task), 0), no_room=2 if task == "boolq" else 0)}
        left_out = 5 if run.method == "milora" and task == "boolq" else 0
        return {"tests": tests, "rows": {"train": 40, "dev": 10, "left_out": left_out}}

    made = section_table(of.sections[0], measured(of, values))
    notes = [note for note in made.notes if "all seeds together" in note]
    # Two seeds of ten rows each; unparsed of LoRA 1 and 2, of DoRA 0 and 3.
    assert notes == [
        "Prompts that leave no room for an answer in the backbone, which are not cut and count as wrong, all seeds "
        "together: in boolq every row (4 of 20 each).",
        "Outputs in which no answer is found, which count as wrong, all seeds together: in boolq MiLoRA (2 of 20); in "
        "piqa LoRA and DoRA (3 of 20 each).",
        "Rows longer than `max_length`, which are left out of training and dev, all seeds together: in boolq MiLoRA "
        "(10 of 110).",
    ]
    lines = {(line["row"], line["column"]): line for line in csv.DictReader(io.StringIO(made.csv()))}
    names = ("test_rows", "unparsed", "no_room", "left_out")
    assert [lines["MiLoRA", "boolq"][name] for name in names] == ["20", "2", "4", "10"]
    assert [lines["DoRA", "piqa"][name] for name in names] == ["20", "3", "0", "0"]


def test_a_training_for_several_columns_has_lost_its_rows_once() -> None:
    of = grid(sections=["table2"], only_methods=["milora"], seeds=(0,))
    found = measured(of, lambda run: {"rows": {"train": 7, "dev": 2, "left_out": 1 if len(run.tasks) == 2 else 0}})
    assert lost_row_notes(of.sections[0], found) == [
        "Rows longer than `max_length`, which are left out of training and dev, all seeds together: in "
        "bundled-choice + bundled-extraction MiLoRA MT (1 of 10)."
    ]


def test_nothing_is_said_where_nothing_is_lost() -> None:
    of = grid(sections=["table1"], only_methods=["lora", "milora"])
    assert lost_row_notes(of.sections[0], measured(of, lambda run: {})) == []
    assert lost_row_notes(of.sections[0], Measurements(of, Results())) == []


def test_a_finished_run_without_a_result_of_a_column_has_no_test_rows_there() -> None:
    of = grid({"mmlu": "no folder mmlu"}, sections=["table3"], only_methods=["milora"], seeds=(0,), tasks=())
    made = section_table(of.sections[0], measured(of, lambda run: {}))
    assert made.rows[0][made.header.index("mmlu")] == "-"
    lines = {line["column"]: line for line in csv.DictReader(io.StringIO(made.csv()))}
    assert (lines["mmlu"]["test_rows"], lines["bbh"]["test_rows"]) == ("0", "10")
