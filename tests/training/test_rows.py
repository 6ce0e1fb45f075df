"""Rows of a run: what is left out and counted, and the dev set of each source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tokenizer import character_tokenizer

from milora import MiLoraError
from milora.training import DataArguments
from milora.training.rows import mix, read_sources


def file_of(folder: Path, name: str, rows: list[tuple[str, str]]) -> str:
    path = folder / name
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    return str(path)


def test_what_does_not_fit_is_counted_by_why(tmp_path: Path) -> None:
    # In characters, with one more for the end of sequence: 10 in all.
    rows = [("a" * 6, "b" * 3), ("a" * 6, "b" * 4), ("a" * 9, "b"), ("a" * 10, "b"), ("a" * 30, "b")]
    source = file_of(tmp_path, "rows.jsonl", rows)
    mixture = mix(read_sources(DataArguments(data=[source], dev_fraction=0.0), 0), character_tokenizer(), 10)
    assert [(row.prompt, row.completion) for row in mixture.train] == [rows[0]]
    assert mixture.counts[source].to_dict() == {"train": 1, "dev": 0, "too_long": 2, "no_room": 2}
    assert mixture.left_out == 4
    with pytest.raises(MiLoraError, match=r"max_length=5 \(5 rows are too long, of 5 the prompt alone\)"):
        mix(read_sources(DataArguments(data=[source], dev_fraction=0.0), 0), character_tokenizer(), 5)


def test_several_sources_each_with_their_own_dev_rows(tmp_path: Path) -> None:
    source = file_of(tmp_path, "rows.jsonl", [(f"row {index}", "x") for index in range(40)])
    data = DataArguments(task=["bundled-choice,bundled-yesno"], data=[source], train_rows=30, dev_rows=3)
    first, again, other = (mix(read_sources(data, seed), character_tokenizer(), None) for seed in (0, 0, 1))
    assert {name: (count.train, count.dev) for name, count in first.counts.items()} == {
        "bundled-choice": (30, 3),
        "bundled-yesno": (30, 3),
        source: (30, 3),
    }
    assert not {row.prompt for row in first.train} & {row.prompt for row in first.dev}
    assert first.dev == again.dev
    assert first.dev != other.dev


def test_a_dev_set_of_its_own(tmp_path: Path) -> None:
    train, dev = (file_of(tmp_path, f"{name}.jsonl", [(name, "x")] * 20) for name in ("train", "dev"))
    mixture = mix(read_sources(DataArguments(data=[train], dev_data=[dev]), 0), character_tokenizer(), None)
    assert {row.prompt for row in mixture.train} == {"train"}
    assert {row.prompt for row in mixture.dev} == {"dev"}
    assert (len(mixture.train), len(mixture.dev)) == (20, 20)


def test_nothing_to_learn_from() -> None:
    with pytest.raises(MiLoraError, match="pass --task"):
        read_sources(DataArguments(), 0)
