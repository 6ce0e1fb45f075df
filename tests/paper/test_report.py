"""The report as a whole: what stands in it beside its tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.grids import grid, record

from milora.paper.grid import Grid
from milora.paper.report import write_report
from milora.paper.store import Results
from milora_core.errors import MiLoraError


def finished(of: Grid, **fields: Any) -> Results:
    """All runs of a grid, each with the same outcome."""
    return Results({run.digest: record(run, **fields) for run in of.runs(Results(), lambda digest: True)})


def test_notes_of_the_folder_stand_near_the_top_and_unused_runs_beside_the_used(tmp_path: Path) -> None:
    of = grid(sections=["table1"], only_methods=["lora"], seeds=(0,))
    other = grid(sections=["table1"], only_methods=["lora"], seeds=(3,))
    found = {run.digest: record(run) for one in (of, other) for run in one.runs(Results(), lambda digest: True)}
    notes = "Made on a rainy day.\n\n\n    kept as it is\n"
    (tmp_path / "NOTES.md").write_text(notes, encoding="utf-8")
    report = write_report(of, Results(found), tmp_path, "milora report --table 1")
    text = report.path.read_text()
    before, _, after = text.partition(notes)
    assert before == (
        "# The paper's tables and figures, measured\n\nMade by `milora report --table 1`. Runs are in "
        "[`results.jsonl`](results.jsonl), a line each.\n\n"
    )
    assert after.startswith("\n## Set-up")
    assert "\n\nThis report makes no use of 2 finished runs in `results.jsonl`" in after
    assert "LoRA: seed 3 (2)." in after
    assert after.index("2 runs, ") < after.index("This report makes no use") < after.index("## Table 1")
    assert (tmp_path / "NOTES.md").read_text() == notes
    assert "NOTES.md" not in report.files
    (tmp_path / "NOTES.md").unlink()
    assert "rainy" not in write_report(of, Results(found), tmp_path).path.read_text()


def test_notes_that_cannot_be_read_are_a_user_s_error(tmp_path: Path) -> None:
    (tmp_path / "NOTES.md").write_bytes("Notes".encode("utf-16"))
    with pytest.raises(MiLoraError, match=r"NOTES\.md is not UTF-8 but UTF-16"):
        write_report(grid(sections=["table1"], only_methods=["lora"]), Results(), tmp_path)


def test_lost_rows_stand_under_figure_2(tmp_path: Path) -> None:
    of = grid(sections=["figure2"], tasks=("boolq",), seeds=(0,))
    share = {"experts": ["a.q", "a.k"], "blocks": [0], "share": [[1.0, 0.0]], "prompts": 7}
    score = {"accuracy": 0.5, "rows": 10, "correct": 5, "unparsed": 0, "no_room": 3}
    found = finished(of, tests={"boolq": score}, expert_shares={"boolq": share})
    text = write_report(of, found, tmp_path).path.read_text()
    assert "count as wrong, all seeds together: in boolq MiLoRA (3 of 10).\n\nNumbers:" in text


def test_a_report_without_runs_names_no_file_of_them(tmp_path: Path) -> None:
    text = write_report(grid(sections=["table4"]), Results(), tmp_path, "milora report --table 4", lambda _: ["slow"])
    assert "Made by `milora report --table 4`.\n" in text.path.read_text()
    assert "results.jsonl" not in text.path.read_text()


def test_mt_bench_has_the_routes_of_its_runs_and_says_what_its_grade_lacks(tmp_path: Path) -> None:
    of = grid(sections=["table3", "figure2"], only_methods=["milora"], tasks=(), seeds=(0,))
    share = {"experts": ["a.q", "a.k"], "blocks": [0], "share": [[1.0, 0.0]], "prompts": 80}
    score = {"accuracy": 0.5, "rows": 10, "correct": 5, "unparsed": 0, "no_room": 0}
    found = finished(of, tests={"mmlu": score}, expert_shares={"mt-bench": share})
    text = write_report(of, found, tmp_path).path.read_text()
    table, _, figure = text.partition("## Figure 2")
    assert "Not run: mt-bench: its answers are judged by a model, which --judge-url names." in table
    assert "- mt-bench: the most used expert is `a.q` with 100.0%" in figure
    assert "Not run: mt-bench" not in figure
    assert "mt-bench,0,a.q,1.0000" in (tmp_path / "figure2.csv").read_text()


def test_the_grade_of_a_judge_is_no_percentage(tmp_path: Path) -> None:
    of = grid(
        sections=["table3"], only_methods=["milora"], tasks=(), seeds=(0, 1, 2), judge_url="http://127.0.0.1:9/v1"
    )
    found = {}
    for run in of.runs(Results(), lambda digest: True):
        grade = {"score": [6.25, 7.5, 7.0][run.seed], "rows": 160, "unparsed": 0, "no_room": 0}
        found[run.digest] = record(run, tests={"mt-bench": grade})
    write_report(of, Results(found), tmp_path)
    row = (tmp_path / "table3.csv").read_text().splitlines()[1].split(",")
    assert row[:8] == ["table3", "MiLoRA", "milora", "", "mt-bench", "7.0", "6.25", "7.5"]
