"""Tables from results made by hand, compared with medians worked out by hand."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image
from support.grids import grid, record

from milora.paper.grid import Grid
from milora.paper.plan import make_plan
from milora.paper.report import write_report
from milora.paper.statistics import Measurements, Summary, leaders
from milora.paper.store import Results
from milora.paper.tables import Table, section_table, summary_text

Accuracies = dict[tuple[str, str], list[float | None]]


def results(of: Grid, accuracies: Accuracies, **values: Any) -> Results:
    """Finished runs with the accuracy of a method on a task for each seed; none where it is `None`."""
    found = {}
    for run in of.runs(Results(), lambda digest: True):
        accuracy = accuracies[run.method, "+".join(run.tasks)][run.seed]
        if accuracy is not None:
            found[run.digest] = record(run, accuracy, **values)
    return Results(found)


def table(of: Grid, found: Results, name: str) -> Table:
    section = next(section for section in of.sections if section.name == name)
    return section_table(section, Measurements(of, found))


def test_medians_spread_average_and_what_is_bold() -> None:
    of = grid(sections=["table1"], only_methods=["lora", "milora"], seeds=(0, 1, 2), tasks=("bundled-choice", "boolq"))
    # BoolQ is one of the paper's tasks, so it is all that Table 1 has.
    assert of.sections[0].columns == ("boolq",)
    of = grid(sections=["table1"], only_methods=["lora", "milora"], seeds=(0, 1, 2), tasks=("boolq", "piqa"))
    found = results(
        of,
        {
            ("lora", "boolq"): [0.5, 0.7, 0.6],
            ("lora", "piqa"): [0.2, 0.1, 0.3],
            ("milora", "boolq"): [0.65, 0.8, 0.9],
            ("milora", "piqa"): [0.4, 0.5, 0.6],
        },
    )
    made = table(of, found, "table1")
    assert made.header == (
        "", "tunable, M", "activated, M", "boolq", "paper", "piqa", "paper", "average", "paper, its 7 tasks",
    )  # fmt: skip
    lora, milora = made.rows
    # Seeds' means of LoRA: 0.35, 0.4, 0.45.
    assert lora[3:] == ("60.0 (50.0 to 70.0)", "68.8", "20.0 (10.0 to 30.0)", "81.4", "40.0 (35.0 to 45.0)", "58.4")
    # On BoolQ the seeds overlap (65 and 70), on PIQA and in the mean (52.5 and 45) they do not.
    assert milora[3:] == (
        "80.0 (65.0 to 90.0)",
        "72.8",
        "**50.0** (40.0 to 60.0)",
        "83.3",
        "**65.0** (52.5 to 75.0)",
        "61.5",
    )
    notes = " ".join(made.notes)
    assert "boolq, where MiLoRA has the highest median and 1 of the others reaches it" in notes
    assert "above every other row's highest (piqa and average)" in notes
    assert "MiLoRA has place 1 of 2 (in the paper 1 of 2)" in notes
    assert "0.00 (paper 80)" in lora[1]


def test_csv_has_a_line_for_each_number() -> None:
    of = grid(sections=["table1"], only_methods=["lora"], seeds=(0, 1, 2), tasks=("boolq", "piqa"))
    found = results(of, {("lora", "boolq"): [0.5, 0.7, 0.6], ("lora", "piqa"): [0.2, None, None]})
    boolq, piqa, average = csv.DictReader(io.StringIO(table(of, found, "table1").csv()))
    assert (boolq["median"], boolq["min"], boolq["max"], boolq["seeds"]) == ("60.0", "50.0", "70.0", "3")
    assert boolq["values"] == "50.000 70.000 60.000"
    assert (boolq["paper"], boolq["test_rows"], boolq["tunable"]) == ("68.8", "30", "100")
    assert (piqa["median"], piqa["seeds"]) == ("20.0", "1")
    # Only seed 0 has both tasks.
    assert (average["column"], average["median"], average["seeds"]) == ("average", "35.0", "1")


def test_one_adapter_for_all_tasks_beside_one_for_each() -> None:
    of = grid(sections=["table2"], only_methods=["lora"], seeds=(0,))
    found = results(
        of, {("lora", "bundled-choice"): [0.5], ("lora", "bundled-extraction"): [0.7],
             ("lora", "bundled-choice+bundled-extraction"): [0.9]},
    )  # fmt: skip
    made = table(of, found, "table2")
    assert [row[0] for row in made.rows] == ["LoRA ST", "LoRA MT"]
    assert [row[3:6] for row in made.rows] == [("50.0", "70.0", "60.0"), ("90.0", "90.0", "90.0")]
    assert [row[6] for row in made.rows] == ["72.2", "70.2"]


def test_what_is_missing_is_said_with_its_reason() -> None:
    of = grid(
        {"piqa": "no folder piqa"}, sections=["table1"], only_methods=["lora"], seeds=(0, 1), tasks=("boolq", "piqa")
    )
    found = results(of, {("lora", "boolq"): [0.5, None]})
    made = table(of, found, "table1")
    assert made.rows[0][3] == "50.0 (1 of 2 seeds)"
    assert made.rows[0][5] == "-"
    assert "Not run: piqa: no folder piqa." in made.notes
    records = list(csv.DictReader(io.StringIO(made.csv())))
    assert [(one["column"], one["missing"]) for one in records[:2]] == [("boolq", ""), ("piqa", "no folder piqa")]
    empty = table(of, Results(), "table1")
    assert empty.notes[0] == "Nothing has been measured for this table yet."


def test_table_7_has_the_paper_s_rows_by_backbone() -> None:
    of = grid({"llama-2-13b": "no weights"}, sections=["table7"], tasks=("boolq",), seeds=(0,))
    found = results(of, {("moelora", "boolq"): [0.25], ("milora", "boolq"): [0.5]})
    made = table(of, found, "table7")
    assert [(row[0], row[1], row[2]) for row in made.rows] == [
        ("Llama-2 13B: MOELoRA", "-", "73.5"),
        ("Llama-2 13B: MiLoRA", "-", "74.9"),
        ("Gemma 2B: MOELoRA", "25.0", "62.3"),
        ("Gemma 2B: MiLoRA", "50.0", "63.9"),
    ]
    assert "Not run: Llama-2 13B, boolq: no weights." in made.notes


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[3, 4, 5], [1, 2, 2.9]], (0, True)),
        ([[1, 2, 3], [3, 4, 5]], (1, False)),
        ([[1], [2]], (1, False)),
        ([[1, 2], [0, 3]], (None, False)),
        ([[1, 2], None], (0, False)),
        ([None, None], (None, False)),
    ],
)
def test_who_leads(values: list[list[float] | None], expected: tuple[int | None, bool]) -> None:
    summaries = [None if one is None else Summary(tuple(one), len(one)) for one in values]
    assert leaders(summaries) == expected


def test_summaries_as_text() -> None:
    assert summary_text(Summary((1, 3, 10), 3)) == "3.0 (1.0 to 10.0)"
    assert summary_text(Summary((1, 4), 3)) == "2.5 (1.0 to 4.0; 2 of 3 seeds)"
    assert summary_text(Summary((1,), 1), bold=True) == "**1.0**"


def test_the_report_is_whole_with_pictures_and_numbers(tmp_path: Path) -> None:
    of = grid(
        sections=["table1", "figure2", "figure3", "figure4"],
        only_methods=["lora", "milora", "moelora"],
        limits={"figure3": {"values": [1, 3]}, "figure4": {"values": [0, 0.01]}},
        training={"max_steps": 5},
        seeds=(0, 1),
    )
    share = {"experts": ["a.q_proj", "a.k_proj"], "blocks": [0, 1], "share": [[1.0, 0.0], [0.5, 0.5]], "prompts": 4}
    found = {}
    for run in of.runs(Results(), lambda digest: True):
        shares = dict.fromkeys(run.tests, share) if run.method == "milora" else {}
        found[run.digest] = record(run, 0.5 + 0.1 * run.seed, expert_shares=shares)
    done = found.popitem()
    report = write_report(of, Results(found, {done[0]: ["it broke"]}), tmp_path, "milora report --figure 2")
    assert set(report.files) == {
        "README.md", "table1.csv", "figure2.png", "figure2.csv", "figure3.png", "figure3.csv", "figure4.png",
        "figure4.csv",
    }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == set(report.files)
    text = report.path.read_text()
    for expected in (
        "5 steps (the paper: at most 10 epochs",
        "Seeds: 2 (0, 1); the paper has 5",
        "not Llama-2 7B",
        "![Figure 3: the number of chosen experts k](figure3.png)",
        "the most used expert is `a.q_proj` with 75.0%, above the paper's 30 %",
        ": it broke",
        "milora report --figure 2",
    ):
        assert expected in text, expected
    for name in ("figure2.png", "figure3.png", "figure4.png"):
        assert image.imread(tmp_path / name).shape[1] > 500
    numbers = list(csv.DictReader(io.StringIO((tmp_path / "figure2.csv").read_text())))
    overall = {
        row["expert"]: float(row["share"])
        for row in numbers
        if row["block"] == "all" and row["task"] == "bundled-choice"
    }
    assert overall == {"a.q_proj": 0.75, "a.k_proj": 0.25}


def test_the_estimate_is_from_runs_of_the_same_method_or_a_guess_that_says_so() -> None:
    of = grid(sections=["table2"], only_methods=["lora", "milora"], seeds=(0,))
    plan = make_plan(of, Results(), of.cells())
    assert plan.seconds == 6 * 60
    assert "a guess" in plan.basis
    assert make_plan(of, Results(), of.cells(), 5.0).seconds == 30
    runs = of.runs(Results(), lambda digest: True)
    lora = [run for run in runs if run.method == "lora" and len(run.tasks) == 1]
    found = Results(
        {run.digest: record(run, seconds={"total": total}) for run, total in zip(lora, (10, 20), strict=True)}
    )
    plan = make_plan(of, found, of.cells())
    # Two are done; LoRA for both tasks takes as long as its others, MiLoRA as long as any.
    assert plan.seconds == 15 + 3 * 15
    assert [planned.state for planned in plan.runs].count("finished") == 2
    assert "2 finished runs" in plan.basis
