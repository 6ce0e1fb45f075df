"""Fingerprints of rows: equal for equal rows, wherever they lie, and another for other rows."""

from __future__ import annotations

import json
from pathlib import Path

from support.grids import EverythingAtHand, grid

from milora.paper.grid import Grid
from milora.paper.materials import Materials
from milora.paper.request_reading import read_request
from milora.paper.runs import Run
from milora.paper.store import Results

BUNDLED = "bundled-choice"


def write(path: Path, completions: list[str]) -> str:
    path.parent.mkdir(exist_ok=True)
    rows = [{"prompt": f"prompt {number}", "completion": text} for number, text in enumerate(completions)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def first(materials: Materials, **flags: object) -> Run:
    values = {"sections": ["table2"], "only_methods": ["lora"], "tasks": [BUNDLED], "seeds": (0,), "budget": "paper"}
    return runs(Grid(read_request(None, {**values, **flags}), materials))[0]


def runs(of: Grid) -> list[Run]:
    return of.runs(Results(), lambda digest: False)


class OtherDev(EverythingAtHand):
    """The same, but that dev has other rows."""

    def rows_fingerprint(self, source: str, split: str) -> str:
        return f"{source}/other" if split == "dev" else super().rows_fingerprint(source, split)


def test_splits_and_sources_have_their_own(tmp_path: Path) -> None:
    materials = Materials()
    of_splits = {materials.rows_fingerprint(BUNDLED, split) for split in ("train", "dev", "test")}
    assert len(of_splits) == 3
    assert Materials().rows_fingerprint(BUNDLED, "dev") == materials.rows_fingerprint(BUNDLED, "dev")
    here = materials.rows_fingerprint(write(tmp_path / "dev.jsonl", ["a", "b"]), "dev")
    assert here == materials.rows_fingerprint(write(tmp_path / "there" / "rows.jsonl", ["a", "b"]), "dev")
    assert here != materials.rows_fingerprint(write(tmp_path / "other.jsonl", ["a", "c"]), "dev")
    assert materials.rows_missing(str(tmp_path / "nowhere.jsonl"), "dev") is not None


def test_a_folder_for_dev_is_known_by_its_dev_rows(tmp_path: Path) -> None:
    write(tmp_path / "rows" / "train.jsonl", ["a"])
    folder = Path(write(tmp_path / "rows" / "dev.jsonl", ["b"])).parent
    before = Materials().rows_fingerprint(str(folder), "dev")
    write(folder / "train.jsonl", ["changed"])
    assert Materials().rows_fingerprint(str(folder), "dev") == before
    write(folder / "dev.jsonl", ["changed"])
    assert Materials().rows_fingerprint(str(folder), "dev") != before


def test_the_questions_of_mt_bench_have_one_too(tmp_path: Path) -> None:
    def asked(words: str) -> str | None:
        question = {"question_id": 81, "category": "writing", "turns": [words, "Shorter."]}
        (tmp_path / "mt_bench").mkdir(exist_ok=True)
        (tmp_path / "mt_bench" / "question.jsonl").write_text(json.dumps(question) + "\n")
        return Materials(str(tmp_path)).rows_fingerprint("mt-bench", "test")

    assert asked("Write.") == asked("Write.") != asked("Sing.")
    assert Materials(str(tmp_path)).rows_missing("mt-bench", "test") is None
    assert "question.jsonl" in str(Materials(str(tmp_path / "nowhere")).rows_missing("mt-bench", "test"))


def test_a_shape_without_weights_says_where_one_with_weights_is_named() -> None:
    missing = str(Materials().backbone_missing("gemma-2b"))
    assert "--backbone" in missing
    assert "other_backbones" in missing


def test_a_run_with_other_dev_rows_is_another_run() -> None:
    assert first(EverythingAtHand()).fingerprints["dev"] == {BUNDLED: f"{BUNDLED}/dev"}
    assert first(EverythingAtHand()).digest != first(OtherDev()).digest


def test_of_other_dev_rows_only_those_count_unless_accuracy_is_measured_on_dev(tmp_path: Path) -> None:
    file = write(tmp_path / "dev.jsonl", ["a"])
    own = first(Materials(), data={"dev_data": file})
    assert set(own.fingerprints["dev"]) == {file}
    assert first(Materials(), data={"dev_data": [file]}).fingerprints == own.fingerprints
    both = first(Materials(), data={"dev_data": file}, evaluation={"dev_rows": 2})
    assert set(both.fingerprints["dev"]) == {file, BUNDLED}
    write(tmp_path / "dev.jsonl", ["b"])
    assert first(Materials(), data={"dev_data": file}).digest != own.digest


def test_a_grid_of_several_tasks_has_them_all() -> None:
    run = next(run for run in runs(grid(sections=["table2"])) if len(run.tasks) == 2)
    assert set(run.fingerprints["dev"]) == set(run.tasks)
