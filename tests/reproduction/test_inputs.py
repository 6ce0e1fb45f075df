"""Fingerprints: equal for equal contents in any place, different after a change of one label or weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.grids import grid
from support.tokenizer import save_backbone

from milora_core.errors import MiLoraError
from reproduction import inputs
from reproduction.grid import Run
from reproduction.inputs import Inputs, backbone_config, dataset_revision
from reproduction.settings import read_request

ROWS = 200


def boolq(folder: Path, labels: list[str]) -> None:
    rows = [
        {"instruction": f"Question {i}?", "input": "", "output": f"the correct answer is {label}", "answer": label}
        for i, label in enumerate(labels)
    ]  # fmt: skip
    (folder / "boolq").mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        (folder / "boolq" / f"{split}.json").write_text(json.dumps(rows))


def run_of(folder: Path, **settings: Any) -> tuple[Inputs, Run]:
    values = {"sections": ["table1"], "only_methods": ["lora"], "tasks": ["boolq"], "seeds": (0,), **settings}
    of = grid(data_dir=str(folder), **values)
    return Inputs(of.request), of.runs()[0]


def test_every_row_counts(tmp_path: Path) -> None:
    labels = ["true", "false"] * (ROWS // 2)
    boolq(tmp_path / "here", labels)
    boolq(tmp_path / "there", labels)
    look, run = run_of(tmp_path / "here")
    before = look.fingerprints(run)
    assert set(before) == {"backbone", "train", "dev", "test"}
    other_look, other_run = run_of(tmp_path / "there")
    assert other_look.fingerprints(other_run) == before
    for row in range(0, ROWS, 37):
        changed = [*labels[:row], "true" if labels[row] == "false" else "false", *labels[row + 1 :]]
        boolq(tmp_path / "there", changed)
        look, run = run_of(tmp_path / "there")
        assert look.fingerprints(run)["test"] != before["test"], row


def test_dev_rows_may_come_from_elsewhere(tmp_path: Path) -> None:
    boolq(tmp_path, ["true"] * 40)
    dev = tmp_path / "dev.jsonl"
    dev.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    look, run = run_of(tmp_path, data={"dev_data": [str(dev)]})
    assert set(look.fingerprints(run)["dev"]) == {str(dev)}


def test_the_questions_of_mt_bench_have_one_too(tmp_path: Path) -> None:
    def asked(words: str) -> str:
        question = {"question_id": 81, "category": "writing", "turns": [words, "Shorter."]}
        (tmp_path / "mt_bench").mkdir(exist_ok=True)
        (tmp_path / "mt_bench" / "question.jsonl").write_text(json.dumps(question) + "\n")
        return Inputs(read_request(None, {"data_dir": str(tmp_path)}))._rows_fingerprint("mt-bench", "test")

    assert asked("Write.") == asked("Write.") != asked("Sing.")


def test_a_backbone_is_known_by_its_files_wherever_they_lie(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_backbone(tmp_path / name)
    first, second = (inputs._backbone_fingerprint(str(tmp_path / name)) for name in ("a", "b"))
    assert first == second
    weights = tmp_path / "b" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert inputs._backbone_fingerprint(str(tmp_path / "b")) != first


def test_what_is_missing_is_named_and_takes_away_no_more_than_it_must(tmp_path: Path) -> None:
    boolq(tmp_path, ["true"] * 40)
    look, run = run_of(tmp_path)
    possible = look.possible(run)
    assert possible is not None
    assert possible.tests == ("boolq",)
    look, run = run_of(tmp_path, tasks=["piqa"])
    assert look.possible(run) is None
    assert "piqa" in look.missing["piqa (train)"]
    look, run = run_of(tmp_path, backbone="gemma-2b")
    assert look.possible(run) is None
    assert "shape without weights" in look.missing["gemma-2b"]
    look, run = run_of(tmp_path, sections=["table3"], only_methods=["moelora"], tasks=())
    assert look.possible(run) is None
    assert "judge" in look.missing["mt-bench"]


def test_revisions_come_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "datasets--google--boolq" / "snapshots" / "abc").mkdir(parents=True)
    assert dataset_revision("google/boolq") == "abc"
    assert dataset_revision("nobody/rows") is None
    of = grid(sections=["table1"], only_methods=["lora"], tasks=["boolq"], seeds=(0,))
    assert Inputs(of.request).revisions(of.runs()[0]) == {"google/boolq": "abc"}
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(inputs, "commit_of", lambda *of: asked.append(of) or "def")
    of = grid(sections=["table1"], only_methods=["lora"], seeds=(0,), backbone="a/b", data={"model_revision": "v2"})
    assert Inputs(of.request).revisions(of.runs()[0]) == {"a/b": "def"}
    assert asked == [("a/b", "v2")]


def test_a_configuration_without_the_network() -> None:
    assert backbone_config("tiny", network=False).num_hidden_layers == 4
    assert backbone_config("llama-2-7b", network=False).num_hidden_layers == 32
    assert backbone_config("nobody/has-this", network=False) is None
    with pytest.raises(MiLoraError, match="cannot be loaded"):
        backbone_config("nobody/has this", network=True)
