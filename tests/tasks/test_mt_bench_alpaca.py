"""Tasks without a gold answer: MT-Bench, which needs a judge, and Alpaca, for training."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from support.data import real

from milora.tasks import alpaca, mt_bench, registry
from milora.tasks.alpaca import Alpaca
from milora.tasks.mt_bench import MtBench, Question, load_questions
from milora.tasks.rows import instruction_prompt
from milora.tasks.sources import read_rows
from milora.tasks.task import Example
from milora_core.errors import DataError, MiLoraError

BLOG = {
    "question_id": 81,
    "category": "writing",
    "turns": ["Compose a post.", "Start with A."],
    "reference": ["x", "y"],
}
RACE = {
    "question_id": 101,
    "category": "reasoning",
    "turns": ["Which place?", "And now?"],
    "reference": ["2nd", "last"],
}
ANSWER = {"question_id": 101, "model_id": "gpt-4", "choices": [{"index": 0, "turns": ["Second.", "Second to last."]}]}


def write(path: Path, *rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


class TestMtBench:
    def test_real_questions(self) -> None:
        questions = load_questions(real("mt_bench"))
        assert [question.id for question in questions] == list(range(81, 161))
        assert Counter(question.category for question in questions) == dict.fromkeys(
            ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"], 10
        )
        assert [question.id for question in questions if question.references] == list(range(101, 131))
        assert all(len(question.references) in (0, 2) for question in questions)

    @pytest.mark.parametrize("reference_file", mt_bench.REFERENCE_FILES)
    @pytest.mark.parametrize("folder", ["mt_bench", "."])
    def test_fastchat_s_folder(self, tmp_path: Path, folder: str, reference_file: str) -> None:
        write(tmp_path / folder / "question.jsonl", BLOG, RACE)
        write(tmp_path / folder / reference_file, ANSWER)
        assert MtBench(tmp_path).questions() == [
            Question(81, "writing", ("Compose a post.", "Start with A.")),
            Question(101, "reasoning", ("Which place?", "And now?"), ("Second.", "Second to last.")),
        ]

    def test_own_references_where_there_is_no_file_of_them(self, tmp_path: Path) -> None:
        write(tmp_path / "question.jsonl", BLOG, RACE, {**RACE, "question_id": 102, "reference": ["2nd", ""]})
        assert [question.references for question in load_questions(tmp_path)] == [(), ("2nd", "last"), ()]

    def test_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = [
            {"prompt": row["turns"], "prompt_id": 7, "category": row["category"], "reference": row["reference"]}
            for row in (BLOG, RACE)
        ]

        def load_split(name: str, split: str) -> Dataset:
            assert (name, split) == ("HuggingFaceH4/mt_bench_prompts", "train")
            return Dataset.from_list(rows)

        monkeypatch.setattr(mt_bench, "load_split", load_split)
        assert load_questions() == [
            Question(81, "writing", ("Compose a post.", "Start with A.")),
            Question(82, "reasoning", ("Which place?", "And now?"), ("2nd", "last")),
        ]

    @pytest.mark.parametrize(
        ("rows", "references", "message"),
        [
            ([BLOG, {"question_id": 82, "turns": ["a", "b"]}], [], "question.jsonl, line 2: `category` is missing"),
            ([{**BLOG, "turns": ["a"]}], [], "question.jsonl, line 1: question 81 has 1 turns, it must have 2"),
            ([{**BLOG, "turns": "ab"}], [], "line 1: `turns` is a string, it must be a list of strings"),
            ([BLOG, BLOG], [], "line 2: `question_id` 81 is there twice"),
            ([BLOG], [ANSWER], "gpt-4.jsonl, line 1: a reference for question 101, which is not in "),
            ([RACE], [{"question_id": 101, "choices": []}], "line 1: `choices` must be a list with one answer"),
            ([RACE], [{"question_id": 101, "choices": [{"turns": ["a"]}]}], "line 1: a reference of 1 turns"),
        ],
    )
    def test_bad_rows(self, tmp_path: Path, rows: list[Any], references: list[Any], message: str) -> None:
        write(tmp_path / "question.jsonl", *rows)
        if references:
            write(tmp_path / "reference_answer_gpt-4.jsonl", *references)
        with pytest.raises(DataError) as caught:
            load_questions(tmp_path)
        assert message in str(caught.value)

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"question\.jsonl: no such file; .*from the hub \(HuggingFaceH4/mt_bench_"):
            load_questions(tmp_path)

    def test_what_it_cannot_do(self) -> None:
        task = registry.get("mt-bench")
        for ask in (
            lambda: task.examples("test"),
            lambda: read_rows("mt-bench"),
            lambda: read_rows("mt-bench", "test"),
        ):
            with pytest.raises(MiLoraError, match="mt-bench has no rows with a gold answer: its 80 questions"):
                ask()
        with pytest.raises(MiLoraError, match=r"mt-bench has no answer that is right or wrong: .*judged by a model"):
            task.is_correct("a", "a")


class TestAlpaca:
    ROW = {"instruction": "Name a fruit.", "input": "", "output": "Apple.", "text": "..."}  # noqa: RUF012

    def rows(self, count: int) -> list[dict[str, str]]:
        return [{**self.ROW, "instruction": f"Name fruit {number}."} for number in range(count)]

    def test_rows(self, tmp_path: Path) -> None:
        rows = [{**self.ROW, "input": "A red one."}, {**self.ROW, "output": ""}, *self.rows(19)]
        (tmp_path / "alpaca_data.json").write_text(json.dumps(rows), encoding="utf-8")
        task = Alpaca(tmp_path)
        train, dev = task.examples("train"), task.examples("dev")
        assert (len(train), len(dev)) == (18, 2)  # the row without an output is skipped
        assert Example(instruction_prompt("Name a fruit.", "A red one."), "Apple.", "Apple.") in [*train, *dev]
        assert {row.prompt for row in train}.isdisjoint(row.prompt for row in dev)
        assert len(read_rows("alpaca", data_dir=tmp_path)) == 18

    def test_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load_split(name: str, split: str) -> Dataset:
            assert (name, split) == ("tatsu-lab/alpaca", "train")
            return Dataset.from_list(self.rows(20))

        monkeypatch.setattr(alpaca, "load_split", load_split)
        assert [len(Alpaca().examples(split)) for split in ("train", "dev")] == [18, 2]

    def test_what_it_cannot_do(self, tmp_path: Path) -> None:
        with pytest.raises(MiLoraError, match="alpaca has no split 'test'; its splits: train, dev"):
            Alpaca().examples("test")
        with pytest.raises(MiLoraError, match="alpaca is for training only, its answers cannot be graded"):
            Alpaca().parse("Apple.")
        with pytest.raises(DataError, match=r"alpaca/train\.json: no such file, nor alpaca/alpaca_data\.json"):
            Alpaca(tmp_path).examples("train")

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"instruction": "a", "input": ""}, "row 2: `output` is missing; fields found: `instruction`, `input`"),
            ({"instruction": " ", "output": "a"}, "row 2: `instruction` is empty"),
            ({"instruction": "a", "input": 7, "output": "a"}, "row 2: `input` is a number, it must be a string"),
        ],
    )
    def test_bad_rows(self, tmp_path: Path, row: dict[str, Any], message: str) -> None:
        (tmp_path / "alpaca").mkdir()
        (tmp_path / "alpaca" / "train.json").write_text(json.dumps([self.ROW, row]), encoding="utf-8")
        with pytest.raises(DataError) as caught:
            Alpaca(tmp_path).examples("train")
        assert f"alpaca/train.json, {message}" in str(caught.value)
