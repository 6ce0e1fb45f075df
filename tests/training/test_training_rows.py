"""Rows of a run: rows that are left out and counted, and each source's dev set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.tokenizer import character_tokenizer, save_backbone

from milora import MiLoraError
from milora.training import DataArguments, MethodArguments, TrainingArguments, train
from milora.training.training_rows import mix, read_sources


def file_of(folder: Path, name: str, rows: list[tuple[str, str]]) -> str:
    path = folder / name
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    return str(path)


def test_what_does_not_fit_is_counted_by_why(tmp_path: Path) -> None:
    # In characters; with the end token they must fit in 10.
    rows = [("a" * 6, "b" * 3), ("a" * 6, "b" * 4), ("a" * 9, "b"), ("a" * 10, "b"), ("a" * 30, "b")]
    source = file_of(tmp_path, "rows.jsonl", rows)
    mixture = mix(read_sources(DataArguments("tiny", data=[source], dev_fraction=0.0), 0), character_tokenizer(), 10)
    assert [(row.prompt, row.completion) for row in mixture.train] == [rows[0]]
    assert mixture.counts[source].to_dict() == {"train": 1, "dev": 0, "too_long": 2, "no_room": 2}
    assert mixture.left_out == 4
    with pytest.raises(MiLoraError, match=r"max_length=5 \(5 rows are too long, 5 of them because"):
        mix(read_sources(DataArguments("tiny", data=[source], dev_fraction=0.0), 0), character_tokenizer(), 5)


def test_several_sources_each_with_their_own_dev_rows(tmp_path: Path) -> None:
    source = file_of(tmp_path, "rows.jsonl", [(f"row {index}", "x") for index in range(40)])
    data = DataArguments("tiny", task=["bundled-choice,bundled-yesno"], data=[source], train_rows=30, dev_rows=3)
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
    mixture = mix(read_sources(DataArguments("tiny", data=[train], dev_data=[dev]), 0), character_tokenizer(), None)
    assert {row.prompt for row in mixture.train} == {"train"}
    assert {row.prompt for row in mixture.dev} == {"dev"}
    assert (len(mixture.train), len(mixture.dev)) == (20, 20)


def test_nothing_to_learn_from() -> None:
    with pytest.raises(MiLoraError, match="pass --task"):
        read_sources(DataArguments("tiny"), 0)


def test_a_folder_s_own_dev_rows(tmp_path: Path) -> None:
    file_of(tmp_path, "train.jsonl", [(f"train {index}", "x") for index in range(20)])
    data = DataArguments("tiny", data=[str(tmp_path)])
    assert len(read_sources(data, 0)[str(tmp_path)].dev) == 2
    file_of(tmp_path, "dev.jsonl", [("dev", "x")] * 3)
    for arguments in (data, DataArguments("tiny", data=[str(tmp_path)], dev_data=[str(tmp_path)])):
        mixture = mix(read_sources(arguments, 0), character_tokenizer(), None)
        assert len(mixture.train) == 20
        assert [row.prompt for row in mixture.dev] == ["dev"] * 3


def test_a_folder_without_dev_rows_is_none_to_measure_on(tmp_path: Path) -> None:
    train = file_of(tmp_path, "train.jsonl", [("train", "x")] * 20)
    with pytest.raises(MiLoraError, match="has no split dev or validation to take dev rows from; its splits: train"):
        read_sources(DataArguments("tiny", data=[train], dev_data=[str(tmp_path)]), 0)


class TestHeldOut:
    def held_out(self, source: str, seed: int = 0, fraction: float = 0.1) -> tuple[list[Any], list[Any]]:
        rows = read_sources(DataArguments("tiny", data=[source], dev_fraction=fraction), seed)[source]
        return list(rows.train), list(rows.dev)

    @pytest.mark.parametrize("seed", range(5))
    def test_equal_prompts_stay_on_one_side(self, tmp_path: Path, seed: int) -> None:
        source = file_of(tmp_path, "rows.jsonl", [(f"row {index % 20}", f"{index}") for index in range(60)])
        train, dev = self.held_out(source, seed)
        assert (len(train), len(dev)) == (54, 6)
        assert {row.prompt for row in train}.isdisjoint(row.prompt for row in dev)

    @pytest.mark.parametrize("seed", range(5))
    def test_the_replies_of_a_chat_stay_on_one_side(self, tmp_path: Path, seed: int) -> None:
        chats = [
            [
                {"role": role, "content": f"{role} {turn} of {number}"}
                for turn in range(4)
                for role in ("user", "assistant")
            ]
            for number in range(20)
        ]
        # One more chat starts like another and then continues differently.
        chats.append([*chats[3][:1], *chats[4][1:]])
        path = tmp_path / "chats.jsonl"
        path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
        train, dev = self.held_out(str(path), seed, 0.2)
        openings = [{row.prompt[0]["content"] for row in side} for side in (train, dev)]
        assert openings[0].isdisjoint(openings[1])
        assert len(openings[1]) == 4
        assert len(train) + len(dev) == 84

    def test_prompts_that_begin_alike_are_no_chat(self, tmp_path: Path) -> None:
        shown = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]
        rows = [
            {"prompt": [*shown, {"role": "user", "content": f"{number} + 1"}], "completion": shown[1:]}
            for number in range(20)
        ]
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert [len(side) for side in self.held_out(str(path))] == [18, 2]
        texts = file_of(tmp_path, "texts.jsonl", [("row " * count, "x") for count in range(1, 21)])
        assert [len(side) for side in self.held_out(texts)] == [18, 2]

    def test_how_many(self, tmp_path: Path) -> None:
        def sizes(prompts: list[str], fraction: float = 0.1) -> list[int]:
            source = file_of(tmp_path, "rows.jsonl", [(prompt, "x") for prompt in prompts])
            return [len(side) for side in self.held_out(source, fraction=fraction)]

        assert sizes([f"{number}" for number in range(5)]) == [4, 1]
        assert sizes(["one"]) == [1, 0]
        assert sizes(["one"] * 9) == [9, 0]
        assert sizes([f"{number}" for number in range(5)], fraction=0.0) == [5, 0]
        assert sizes([f"{number}" for number in range(6000)]) == [5500, 500]
        # A prompt with too many rows is not held out.
        assert sizes(["often"] * 501 + ["once", "again"], fraction=0.9)[1] in (1, 2)
        with pytest.raises(MiLoraError, match=r"dev_fraction must be at least 0 and below 1; found 1\.0"):
            sizes(["one"], fraction=1.0)


def test_rows_longer_than_the_backbone_s_positions_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = save_backbone(tmp_path / "backbone", "opt")  # with 128 learned positions
    source = file_of(tmp_path, "rows.jsonl", [(f"row {index}", "x") for index in range(7)] + [("a" * 127, "b")])
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=1, save_strategy="no", load_best_model_at_end=False, use_cpu=True,
        gradient_checkpointing=False, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    result = train(
        DataArguments(str(backbone), data=[source], dev_fraction=0.0), MethodArguments("lora", {"r": 2}), arguments
    )
    assert (result.train_rows, result.skipped_rows) == (7, 1)
    said = [record.getMessage() for record in caplog.records if "max_length" in record.getMessage()]
    assert said == ["max_length is 128 instead of 768: the backbone has no more positions."]


@pytest.mark.parametrize(
    ("max_length", "positions", "fits"), [(768, 512, 512), (768, 768, 768), (768, None, 768), (None, 512, 512)]
)
def test_the_length_that_fits(max_length: int | None, positions: int | None, fits: int) -> None:
    arguments = TrainingArguments("out", max_length=max_length, use_cpu=True)
    arguments.set_length(positions)
    assert arguments.max_length == fits
