"""GSM8K and AQuA: reasoning that leads to the gold answer, and the same prompts from every source."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from support.data import real

from milora.tasks import instruction
from milora.tasks.aqua import Aqua
from milora.tasks.gsm8k import Gsm8k
from milora.tasks.reasoning import ReasoningTask
from milora.tasks.rows import instruction_prompt
from milora.tasks.task import Example
from milora_core.errors import DataError
from reproduction import published

CLIPS = {
    "question": "Natalia sold clips to 48 of her friends in April, and then half as many in May. How many in all?",
    "answer": "In May she sold 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = <<48+24=72>>72 clips.\n#### 1,072",
}
GROCER = {
    "question": "A grocer has D/(M-3) apples. How many? ",
    "options": ["A)D/(M-3)", "B)MD/3", "C)M", "D)0", "E)None of these"],
    "rationale": "It is said in the question.\nANSWER:A",
    "correct": "A",
}
GROCER_INSTRUCTION = (
    "A grocer has D/(M-3) apples. How many? Answer Choices: (A) D/ (M-3)  (B) MD/3 (C) M (D) 0 (E) None of these"
)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    text = "\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows)
    path.write_text(text, encoding="utf-8")


def adapters_row(text: str, output: str, answer: str) -> dict[str, str]:
    return {"instruction": text, "input": "", "output": output, "answer": answer}


class TestRealRows:
    def test_gsm8k(self) -> None:
        task = Gsm8k(real("gsm8k"))
        splits = {split: task.examples(split) for split in ("train", "dev", "test")}
        train, _, test = published.everything()["table6_datasets"]["gsm8k"]
        assert (len(splits["dev"]), len(splits["test"])) == (500, test)
        assert len(splits["train"]) + 500 == train
        assert {row.prompt for row in splits["train"]}.isdisjoint(row.prompt for row in splits["dev"])
        for row in (row for rows in splits.values() for row in rows):
            assert "<<" not in row.completion
            assert "####" not in row.completion
            assert row.completion.endswith(f"\nThe answer is {row.answer}.")
            assert task.is_correct(row.completion, row.answer)
            assert task.is_correct(row.completion.rpartition("\n")[0] + f"\n#### {int(row.answer):,}", row.answer)

    def test_gsm8k_from_both_files_is_the_same_questions_and_answers(self, tmp_path: Path) -> None:
        data = real("gsm8k")
        (tmp_path / "gsm8k").mkdir()
        (tmp_path / "gsm8k" / "test.json").symlink_to(data / "gsm8k" / "test.json")
        adapters = {row.prompt: row for row in Gsm8k(tmp_path).examples("test")}
        original = {row.prompt: row for row in Gsm8k(data).examples("test")}
        assert adapters.keys() == original.keys()
        assert {prompt: row.answer for prompt, row in adapters.items()} == {p: r.answer for p, r in original.items()}

    @pytest.mark.parametrize("task", [Gsm8k, Aqua])
    def test_no_completion_contradicts_its_answer(self, tmp_path: Path, task: type[ReasoningTask]) -> None:
        """Two in five outputs in LLM-Adapters' own test files lead to another answer."""
        data = real(task.folder)
        (tmp_path / task.folder).mkdir()
        (tmp_path / task.folder / "test.json").symlink_to(data / task.folder / "test.json")
        examples = task(tmp_path).examples("test")
        assert len(examples) == published.everything()["table6_datasets"][task.name][-1]
        assert all(task().is_correct(example.completion, example.answer) for example in examples)
        alone = sum(example.completion == task.sentence(example.answer) for example in examples)
        assert 0.3 < alone / len(examples) < 0.6

    def test_aqua_rows_are_worded_as_the_hub_s(self) -> None:
        """Rows of the real file, with the spaces at brackets undone, give the same prompts."""
        raw = json.loads((real("AQuA") / "AQuA" / "test.json").read_text(encoding="utf-8"))
        for fields in raw:
            question, choices = fields["instruction"].split(" Answer Choices:")
            choices = choices.replace(" (", "(").replace(") ", ")")
            places = [choices.index(f"({letter})") for letter in "ABCDE"] + [len(choices)]
            options = [choices[start + 1 : end] for start, end in pairwise(places)]
            row = {"question": question, "options": options, "rationale": "", "correct": fields["answer"]}
            assert Aqua.from_hub_row(row) == Example(
                instruction_prompt(fields["instruction"]), f"The answer is ({fields['answer']}).", fields["answer"]
            )
            assert Aqua().parse(instruction_prompt(fields["instruction"])) is None


class TestRows:
    def test_gsm8k(self) -> None:
        assert Gsm8k.from_hub_row(CLIPS) == Example(
            instruction_prompt(CLIPS["question"]),
            "In May she sold 48/2 = 24 clips.\nIn all 48+24 = 72 clips.\nThe answer is 1072.",
            "1072",
        )

    def test_aqua(self) -> None:
        assert Aqua.from_hub_row(GROCER) == Example(
            instruction_prompt(GROCER_INSTRUCTION),
            "It is said in the question.\nANSWER:A\nThe answer is (A).",
            "A",
        )

    @pytest.mark.parametrize(
        ("task", "row", "message"),
        [
            (Gsm8k, {**CLIPS, "answer": "72"}, "does not end in `####` and a number"),
            (Gsm8k, {**CLIPS, "answer": "so\n#### many"}, "does not end in `####` and a number"),
            (Gsm8k, {"answer": "#### 1"}, "`question` is missing; fields found: `answer`"),
            (Aqua, {**GROCER, "correct": "F"}, "its `correct` is 'F', none of A, B, C, D, E"),
            (Aqua, {**GROCER, "options": ["B)1", "A)2"]}, "its `options` must be A..., B... and so on"),
            (Aqua, {**GROCER, "options": [1, 2]}, "`options` is a list, it must be a list of strings"),
        ],
    )
    def test_bad_rows_are_named_by_file_and_line(
        self, tmp_path: Path, task: type[ReasoningTask], row: dict[str, Any], message: str
    ) -> None:
        write(tmp_path / task.folder / "test.original.jsonl", [CLIPS if task is Gsm8k else GROCER, row])
        with pytest.raises(DataError) as caught:
            task(tmp_path).examples("test")
        assert f"{task.folder}/test.original.jsonl, line 2: " in str(caught.value)
        assert message.replace("A...", "A)...").replace("B...", "B)...") in str(caught.value)

    def test_adapters_rows_keep_only_chains_that_lead_to_the_answer(self, tmp_path: Path) -> None:
        rows = [
            adapters_row("q0", "\nA: 3 + 4 = 7. The answer is 7.", "7.0"),
            adapters_row("q1", "\nA: 3 + 4 = 8. The answer is 8.", "7.0"),
            adapters_row("q2", "rest of the question\nRationale: 3 + 4 = 7 apples", "7"),
        ]
        write(tmp_path / "gsm8k" / "test.json", rows)
        completions = {row.prompt: row.completion for row in Gsm8k(tmp_path).examples("test")}
        assert completions == {
            instruction_prompt("q0"): "3 + 4 = 7.\nThe answer is 7.",
            instruction_prompt("q1"): "The answer is 7.",
            instruction_prompt("q2"): "3 + 4 = 7 apples\nThe answer is 7.",
        }

    def test_an_answer_of_another_kind(self, tmp_path: Path) -> None:
        write(tmp_path / "gsm8k" / "test.json", [adapters_row("q", "o", "A")])
        with pytest.raises(DataError, match=r"gsm8k/test\.json, row 1: the answer is 'A', it must be a number"):
            Gsm8k(tmp_path).examples("test")
        write(tmp_path / "AQuA" / "test.json", [adapters_row("q", "o", "7")])
        with pytest.raises(DataError, match=r"AQuA/test\.json, row 1: the answer is '7', it must be a letter, A to E"):
            Aqua(tmp_path).examples("test")
        write(tmp_path / "AQuA" / "test.json", [{"instruction": "q", "answer": "A"}])
        with pytest.raises(DataError, match=r"AQuA/test\.json, row 1: `output` is missing"):
            Aqua(tmp_path).examples("test")

    def test_what_is_right(self) -> None:
        for output in ("1,072", "She sold 1072.00 clips", "The answer is $1072."):
            assert Gsm8k().is_correct(output, "1072")
        assert not Gsm8k().is_correct("The answer is 1072 1/2", "1072")
        assert Aqua().is_correct("So 5 of 7.\nThe answer is (C).", "C")
        assert not Aqua().is_correct("5", "A")


@pytest.mark.parametrize(
    ("task", "row", "asked"),
    [
        (Gsm8k, CLIPS, [("openai/gsm8k", "train", "main"), ("openai/gsm8k", "test", "main")]),
        (Aqua, GROCER, [("deepmind/aqua_rat", split, "raw") for split in ("train", "validation", "test")]),
    ],
)
def test_hub(
    monkeypatch: pytest.MonkeyPatch, task: type[ReasoningTask], row: dict[str, Any], asked: list[tuple[str, ...]]
) -> None:
    calls = []

    def load_split(name: str, split: str, config: str | None) -> Dataset:
        calls.append((name, split, config))
        return Dataset.from_list([{**row, "question": f"{split} {number}"} for number in range(20)])

    monkeypatch.setattr(instruction, "load_split", load_split)
    rows = task()
    sizes = [len(rows.examples(split)) for split in ("train", "dev", "test")]
    assert calls == asked
    assert sizes == ([18, 2, 20] if task is Gsm8k else [20, 20, 20])
