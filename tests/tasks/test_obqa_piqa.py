"""OpenBookQA and PIQA: rows from the hub's schema, and PIQA's rows from LLM-Adapters' files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from support.data import real

from milora.tasks import instruction
from milora.tasks.label import LabelTask
from milora.tasks.obqa import OpenBookQA
from milora.tasks.piqa import Piqa
from milora.tasks.rows import instruction_prompt
from milora.tasks.task import Example
from milora_core.errors import DataError

SUN = {
    "id": "7-980",
    "question_stem": "The sun is responsible for",
    "choices": {
        "text": ["puppies", "growing old", "flowers wilting", "plants sprouting"],
        "label": ["A", "B", "C", "D"],
    },
    "answerKey": "D",
}
EGGS = {"goal": "Separate yolks", "sol1": "Squeeze a bottle.", "sol2": "Place a bottle.", "label": 0}


def hub(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], features: Features | None = None) -> list[Any]:
    calls: list[Any] = []

    def load_split(name: str, split: str, config: str | None) -> Dataset:
        calls.append((name, split, config))
        return Dataset.from_list(rows, features=features)

    monkeypatch.setattr(instruction, "load_split", load_split)
    return calls


class TestHub:
    def test_obqa(self, monkeypatch: pytest.MonkeyPatch) -> None:
        choices = {"text": List(Value("string")), "label": List(Value("string"))}
        text = Value("string")
        features = Features({"id": text, "question_stem": text, "choices": choices, "answerKey": text})
        calls = hub(monkeypatch, [SUN], features)
        task = OpenBookQA()
        wanted = Example(
            instruction_prompt(
                "Please choose the correct answer to the question: The sun is responsible for\n\n"
                "Answer1: puppies Answer2: growing old Answer3: flowers wilting Answer4: plants sprouting\n\n"
                "Answer format: answer1/answer2/answer3/answer4"
            ),
            "the correct answer is answer4",
            "answer4",
        )
        assert [list(task.examples(split)) for split in ("train", "dev", "test")] == [[wanted]] * 3
        assert calls == [("allenai/openbookqa", split, "main") for split in ("train", "validation", "test")]
        assert task.is_correct("Answer 4.", "answer4")
        assert task.parse("the correct answer is answer5") is None

    def test_piqa(self, monkeypatch: pytest.MonkeyPatch) -> None:
        text = Value("string")
        features = Features({"goal": text, "sol1": text, "sol2": text, "label": ClassLabel(names=["0", "1"])})
        rows = [{**EGGS, "goal": f"goal {number}", "label": number % 2} for number in range(20)]
        calls = hub(monkeypatch, rows, features)
        task = Piqa()
        assert [len(task.examples(split)) for split in ("train", "dev", "test")] == [18, 2, 20]
        assert calls == [("baber/piqa", split, None) for split in ("train", "validation")]
        examples = {example.prompt: example for example in task.examples("test")}
        prompt = instruction_prompt(
            "Please choose the correct solution to the question: goal 7\n\nSolution1: Squeeze a bottle.\n\n"
            "Solution2: Place a bottle.\n\nAnswer format: solution1/solution2"
        )
        assert examples[prompt] == Example(prompt, "the correct answer is solution2", "solution2")

    @pytest.mark.parametrize(
        ("task", "row", "message"),
        [
            (
                OpenBookQA,
                {**SUN, "answerKey": "E"},
                r"openbookqa \(test\), row 1: .*its answer 'E' is none of A, B, C, D",
            ),
            (
                OpenBookQA,
                {**SUN, "question_stem": None},
                r"row 1: `question_stem` is missing; fields found: .*\(null\)",
            ),
            (OpenBookQA, {**SUN, "answerKey": 3}, r"row 1: `answerKey` is a number, it must be a string"),
            (Piqa, {**EGGS, "label": -1}, r"piqa \(validation\), row 1: .*its `label` is -1, it must be 0 or 1"),
            (Piqa, {**EGGS, "sol2": None}, r"row 1: `sol2` is missing; fields found: `goal`, `sol1`, `sol2` \(null\)"),
        ],
    )
    def test_bad_rows(
        self, monkeypatch: pytest.MonkeyPatch, task: type[LabelTask], row: dict[str, Any], message: str
    ) -> None:
        hub(monkeypatch, [row])
        with pytest.raises(DataError, match=message):
            task().examples("test")


class TestFiles:
    def test_piqa_rows_are_worded_as_the_hub_s(self) -> None:
        """Rows in the hub's schema, reconstructed from the real file (the validation split), give the same examples."""
        data = real("piqa")
        raw = json.loads((data / "piqa" / "test.json").read_text(encoding="utf-8"))
        read = {example.prompt: example for example in Piqa(data).examples("test")}
        assert len(Piqa(data).examples("test")) == len(raw) == 1838
        form = (
            r"Please choose the correct solution to the question: (.*)\n\nSolution1: (.*?)\n\nSolution2: (.*)"
            r"\n\nAnswer format: solution1/solution2"
        )
        for fields in raw:
            parts = re.fullmatch(form, fields["instruction"], re.DOTALL)
            assert parts
            row = {"goal": parts[1], "sol1": parts[2], "sol2": parts[3], "label": int(fields["answer"][-1]) - 1}
            example = Piqa.from_hub_row(row)
            assert example.completion == fields["output"]
            assert read[instruction_prompt(fields["instruction"])].prompt == example.prompt
            assert Piqa().is_correct(example.completion, fields["answer"])
            assert Piqa().parse(example.prompt) is None

    def test_rows_in_the_hub_s_schema_and_a_dev_file_of_its_own(self, tmp_path: Path) -> None:
        folder = tmp_path / "openbookqa"
        folder.mkdir()
        for split, key in (("train", "A"), ("dev", "B")):
            lines = [json.dumps({**SUN, "answerKey": key}) for _ in range(12)]
            (folder / f"{split}.original.jsonl").write_text("\n".join(lines), encoding="utf-8")
        task = OpenBookQA(tmp_path)
        assert [example.answer for example in task.examples("train")] == ["answer1"] * 12
        assert [example.answer for example in task.examples("dev")] == ["answer2"] * 12
        (folder / "dev.original.jsonl").write_text(json.dumps(SUN) + "\n\n[1]\n", encoding="utf-8")
        with pytest.raises(
            DataError, match=r"dev\.original\.jsonl, line 3: a row is a list, it must be an object with "
        ):
            OpenBookQA(tmp_path).examples("dev")
