"""The report as a whole: what stands in it beside its tables."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.grids import grid, record

from milora.errors import MiLoraError
from milora.paper.report import write_report
from milora.paper.store import Results


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
    found = {
        run.digest: record(run, tests={"boolq": score}, expert_shares={"boolq": share})
        for run in of.runs(Results(), lambda digest: True)
    }
    text = write_report(of, Results(found), tmp_path).path.read_text()
    assert "count as wrong, all seeds together: in boolq MiLoRA (3 of 10).\n\nNumbers:" in text
