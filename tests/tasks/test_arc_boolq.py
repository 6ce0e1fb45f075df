"""ARC and BoolQ: rows from both sources, and which texts count as an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import example, given
from hypothesis import strategies as st
from support.data import real

from milora.tasks import instruction
from milora.tasks.arc import Arc, ArcChallenge, ArcEasy
from milora.tasks.boolq import BoolQ
from milora.tasks.label import LabelTask
from milora.tasks.public import hold_out
from milora.tasks.rows import instruction_prompt
from milora.tasks.task import SPLITS, Example
from milora_core.errors import DataError, MiLoraError
from reproduction import published

TASKS = [ArcEasy, ArcChallenge, BoolQ]

LICHENS = {
    "id": "Mercury_1",
    "question": "What do the green algae supply to the fungi?",
    "choices": {"text": ["carbon dioxide", "food", "protection"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
SUGAR = {"question": "is powdered sugar the same as icing sugar", "passage": "Powdered sugar ...", "answer": True}


def write_task(data_dir: Path, task: type[LabelTask], split: str, count: int) -> None:
    folder = data_dir / task.folder
    folder.mkdir(exist_ok=True)
    answers = [task.labels[number % 2] for number in range(count)]
    rows = [
        {"instruction": f"q{number}", "input": "", "output": f"the correct answer is {answer}", "answer": answer}
        for number, answer in enumerate(answers)
    ]
    (folder / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")


class TestRealRows:
    @pytest.mark.parametrize("task", TASKS)
    def test_counts_and_gold_outputs(self, task: type[LabelTask]) -> None:
        train, _, test = published.everything()["table6_datasets"][task.name.replace("-", "_")]
        rows = task(real(task.folder))
        splits = {split: rows.examples(split) for split in ("train", "dev", "test")}
        in_all = len(splits["train"]) + len(splits["dev"])
        assert in_all == train
        assert len(splits["test"]) == test
        for row in (row for split in splits.values() for row in split):
            assert rows.is_correct(row.completion, row.answer)
            assert rows.parse(row.prompt) is None  # a list of the choices is not an answer
            assert row.prompt.endswith("\n\n### Response:\n")
        assert {row.prompt for row in splits["train"]}.isdisjoint(row.prompt for row in splits["dev"])
        assert len(splits["dev"]) == pytest.approx(min(500, in_all / 10), abs=2)

    @pytest.mark.parametrize("task", TASKS)
    def test_the_hub_s_rows_are_worded_as_the_files_are(self, task: type[LabelTask]) -> None:
        """Rows in the hub's schema, reconstructed from the real files, give the same examples."""
        raw = json.loads((real(task.folder) / task.folder / "test.json").read_text(encoding="utf-8"))
        checked = 0
        for fields in raw:
            row = as_hub_row(task, fields)
            assert task.from_hub_row(row).prompt == instruction_prompt(fields["instruction"])
            assert task.from_hub_row(row).completion == fields["output"]
            checked += 1
        assert checked == len(raw)


def as_hub_row(task: type[LabelTask], fields: Mapping[str, str]) -> dict[str, Any]:
    body = fields["instruction"].split(": ", 1)[1]
    if task is BoolQ:
        return {"question": body.split("?\n\nAnswer format")[0], "answer": fields["answer"] == "true"}
    question, choices = body.rsplit("\n\nAnswer format", 1)[0].rsplit("\n\nAnswer1: ", 1)
    texts = []
    for number in range(2, 7):
        text, marker, choices = choices.partition(f" Answer{number}: ")
        texts.append(text)
        if not marker:
            break
    keys = list("ABCDE"[: len(texts)])
    answer_key = keys[int(fields["answer"].removeprefix("answer")) - 1]
    return {"question": question, "choices": {"text": texts, "label": keys}, "answerKey": answer_key}


class TestFiles:
    @pytest.mark.parametrize("task", TASKS)
    def test_splits(self, task: type[LabelTask], tmp_path: Path) -> None:
        write_task(tmp_path, task, "train", 40)
        write_task(tmp_path, task, "test", 7)
        rows = task(tmp_path)
        assert [len(rows.examples(split)) for split in ("train", "dev", "test")] == [36, 4, 7]
        everything = {*rows.examples("train"), *rows.examples("dev")}
        assert len(everything) == 40

    def test_seed_orders_but_never_moves_a_row_to_another_split(self, tmp_path: Path) -> None:
        write_task(tmp_path, BoolQ, "train", 60)
        task = BoolQ(str(tmp_path))
        for split in ("train", "dev"):
            assert task.examples(split, seed=1) == BoolQ(tmp_path).examples(split, seed=1)
            assert sorted(map(str, task.examples(split, seed=1))) == sorted(map(str, task.examples(split, seed=2)))
        assert task.examples("train", seed=1) != task.examples("train", seed=2)
        assert task.examples("train", 5, seed=1) == task.examples("train", seed=1)[:5]
        assert len(task.examples("dev", 1000)) == 6

    def test_hold_out_keeps_equal_prompts_together_and_ignores_the_order(self) -> None:
        rows = [Example(f"q{number % 90}", "c", "a") for number in range(100)]
        train, dev = hold_out(rows)
        assert {row.prompt for row in train}.isdisjoint(row.prompt for row in dev)
        assert len(train) + len(dev) == 100
        assert {row.prompt for row in hold_out(rows[::-1])[1]} == {row.prompt for row in dev}
        assert len(hold_out([Example(f"q{number}", "c", "a") for number in range(9000)])[1]) == 500
        assert len(hold_out(rows[:3])[1]) == 1

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no such file; .*ARC-Easy/train\.json.*from the hub \(allenai/ai2_arc\)"):
            ArcEasy(tmp_path).examples("train")

    def test_an_answer_that_is_no_label(self, tmp_path: Path) -> None:
        write_task(tmp_path, ArcEasy, "test", 3)
        (tmp_path / "ARC-Easy").rename(tmp_path / "boolq")
        with pytest.raises(DataError, match=r"test\.json, row 1: the answer is 'answer1', it must be one of true, fal"):
            BoolQ(tmp_path).examples("test")

    def test_a_row_of_messages(self, tmp_path: Path) -> None:
        (tmp_path / "boolq").mkdir()
        chat = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "true"}]
        rows = [{"messages": chat, "answer": "true"}]
        (tmp_path / "boolq" / "test.json").write_text(json.dumps(rows), encoding="utf-8")
        with pytest.raises(DataError, match=r"test\.json, row 1: boolq has rows of text, this one is of messages"):
            BoolQ(tmp_path).examples("test")

    def test_bad_requests(self, tmp_path: Path) -> None:
        with pytest.raises(MiLoraError, match="boolq has no split 'validation'; its splits: train, dev, test"):
            BoolQ(tmp_path).examples("validation")  # type: ignore[arg-type]
        with pytest.raises(MiLoraError, match="count is -1"):
            BoolQ(tmp_path).examples("test", -1)


class TestHub:
    def test_arc_row(self) -> None:
        assert Arc.from_hub_row(LICHENS) == Example(
            instruction_prompt(
                "Please choose the correct answer to the question: What do the green algae supply to the fungi?\n\n"
                "Answer1: carbon dioxide Answer2: food Answer3: protection\n\nAnswer format: answer1/answer2/answer3"
            ),
            "the correct answer is answer2",
            "answer2",
        )

    def test_arc_row_with_numbered_choices(self) -> None:
        choices = {"text": ["a", "b", "c", "d"], "label": ["1", "2", "3", "4"]}
        assert Arc.from_hub_row({**LICHENS, "choices": choices, "answerKey": "4"}).answer == "answer4"

    def test_arc_row_without_its_answer(self) -> None:
        with pytest.raises(DataError, match="its answer 'D' is none of A, B, C"):
            Arc.from_hub_row({**LICHENS, "answerKey": "D"})

    @pytest.mark.parametrize("mark", ["", "?"])
    @pytest.mark.parametrize(("value", "answer"), [(True, "true"), (False, "false")])
    def test_boolq_row(self, mark: str, value: bool, answer: str) -> None:
        assert BoolQ.from_hub_row({**SUGAR, "question": SUGAR["question"] + mark, "answer": value}) == Example(
            instruction_prompt(
                "Please answer the following question with true or false, question: is powdered sugar the same as "
                "icing sugar?\n\nAnswer format: true/false"
            ),
            f"the correct answer is {answer}",
            answer,
        )

    @pytest.mark.parametrize(
        ("task", "row", "config", "asked"),
        [
            (ArcEasy, LICHENS, "ARC-Easy", ["train", "validation", "test"]),
            (ArcChallenge, LICHENS, "ARC-Challenge", ["train", "validation", "test"]),
            (BoolQ, SUGAR, None, ["train", "validation"]),  # dev is split off train
        ],
    )
    def test_splits(
        self,
        monkeypatch: pytest.MonkeyPatch,
        task: type[LabelTask],
        row: dict[str, Any],
        config: str | None,
        asked: list[str],
    ) -> None:
        calls = []

        def load_split(name: str, split: str, config: str | None) -> Dataset:
            calls.append((name, split, config))
            return Dataset.from_list([{**row, "question": f"{split} {number}"} for number in range(20)])

        monkeypatch.setattr(instruction, "load_split", load_split)
        rows = task()
        sizes = {split: len(rows.examples(split)) for split in ("train", "dev", "test")}
        assert calls == [(task.hub_id, split, config) for split in asked]
        assert sizes == ({"train": 18, "dev": 2, "test": 20} if task is BoolQ else dict.fromkeys(SPLITS, 20))

    def test_another_schema(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(instruction, "load_split", lambda *_: Dataset.from_list([{"query": "a", "answer": True}]))
        with pytest.raises(DataError, match="google/boolq lacks the columns question; columns found: query, answer"):
            BoolQ().examples("test")


class TestParse:
    @pytest.mark.parametrize(
        ("output", "answer"),
        [
            ("the correct answer is answer2", "answer2"),
            ("The Correct Answer is Answer2.", "answer2"),
            ("answer3", "answer3"),
            ("  **Answer 4**\n", "answer4"),
            ('Answer: "answer-5"', "answer5"),
            ("The correct answer is\nanswer1", "answer1"),
            ("the correct answer is answer2 because answer1 is false", "answer2"),
            ("the correct answer is answer2\n\nthe correct answer is answer3", "answer2"),
            ("answer1? No. The answer is answer2", "answer2"),
            ("answer2; that answer is right", "answer2"),
            ("answer1, again answer1", "answer1"),
            ("answer1 or answer2", None),
            ("the correct answer is not answer2", None),
            ("the correct answer isn't answer2, the correct answer is answer3", "answer3"),
            ("the correct answer is answer1/answer2/answer3/answer4", None),
            ("the correct answer is answer1 / answer2", None),
            ("Answer format: answer1/answer2\n\nthe correct answer is answer2", "answer2"),
            ("the correct answer is answer6", None),
            ("the correct answer is answer12", None),
            ("the correct answer is food", None),
            ("the correct answer is 2", None),
            ("myanswer2", None),
            ("", None),
        ],
    )
    def test_arc(self, output: str, answer: str | None) -> None:
        assert ArcEasy().parse(output) == answer

    @pytest.mark.parametrize(
        ("output", "answer"),
        [
            ("the correct answer is true", "true"),
            ("True.", "true"),
            ("FALSE", "false"),
            ("The answer is: (false)", "false"),
            ("the correct answer is true. It is false that ...", "true"),
            ("true, not false", "true"),
            ("not true", None),
            ("true or false", None),
            ("Answer format: true/false", None),
            ("the correct answer is true/false", None),
            ("yes", None),
            ("untrue, falsehood", None),
            ("", None),
        ],
    )
    def test_boolq(self, output: str, answer: str | None) -> None:
        assert BoolQ().parse(output) == answer

    @given(
        st.text()
        | st.lists(
            st.sampled_from(["the", "answer", "is", ":", "answer2", "Answer 1", "true", "fal\u017fe", "not", "/", "\n"])
        ).map(" ".join)
    )
    @example("fal\u017fe ANSWER\uff12 answer is \u0130")
    def test_any_text_gives_a_label_or_none(self, text: str) -> None:
        for task in (ArcEasy(), BoolQ()):
            assert task.parse(text) in {*task.labels, None}
            assert task.is_correct(text, task.labels[0]) == (task.parse(text) == task.labels[0])
