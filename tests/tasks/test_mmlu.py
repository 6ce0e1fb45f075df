"""MMLU and its subject names: prompts as in the public harnesses, row counts, disjoint splits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from support.data import real

from milora.tasks import mmlu
from milora.tasks.mmlu import Mmlu
from milora.tasks.mmlu_subject import MmluSubject
from milora_core.errors import DataError, MiLoraError
from reproduction import published

HEADER = "question,choice0,choice1,choice2,choice3,answer\n"
DEV = HEADER + 'What is 1 + 1?,1,2,3,4,1\n"One, two,\nthree?",4,5,6,7,0\n'
TEST = HEADER + "\u2028What is 2 + 2?\u2028,1,2,3,4,3\n"
ZERO_SHOT = (
    "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
    "What is 2 + 2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
)
TWO_SHOT = (
    "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
    "What is 1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
    "One, two,\nthree?\nA. 4\nB. 5\nC. 6\nD. 7\nAnswer: A\n\n"
    "What is 2 + 2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
)


def write(data_dir: Path, split: str, text: str, subject: str = "abstract_algebra") -> None:
    folder = data_dir / "mmlu" / split
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{subject}_{split}.csv").write_text(text, encoding="utf-8")


class TestRealRows:
    def test_counts(self) -> None:
        task = Mmlu(real("mmlu"))
        rows = task.examples("test")
        assert len(rows) == published.everything()["table6_datasets"]["mmlu"][-1]
        assert len({row.group for row in rows}) == 57
        for row in rows[::50]:
            assert task.is_correct(row.completion, row.answer)
            assert row.prompt.startswith(
                f"The following are multiple choice questions (with answers) about {row.group}."
            )
            assert row.prompt.count("\nAnswer:") == 6

    def test_subjects(self) -> None:
        task = MmluSubject(real("mmlu"))
        splits = {split: task.examples(split) for split in ("train", "dev", "test")}
        assert sum(map(len, splits.values())) == 14042
        assert [len(splits[split]) / 14042 for split in splits] == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
        # The split depends on the question, the first line of a prompt.
        seen = [{row.prompt.split("question: ")[1].split("\n\nA. ")[0] for row in rows} for rows in splits.values()]
        assert seen[0].isdisjoint(seen[1])
        assert seen[0].isdisjoint(seen[2])
        assert seen[1].isdisjoint(seen[2])
        for rows in splits.values():
            assert {row.answer for row in rows} == set(task.labels)
            assert all(task.is_correct(row.completion, row.answer) and row.group == row.answer for row in rows)


class TestFiles:
    def test_prompts(self, tmp_path: Path) -> None:
        write(tmp_path, "dev", DEV)
        write(tmp_path, "test", TEST)
        for shots, prompt in ((0, ZERO_SHOT), (2, TWO_SHOT)):
            (row,) = Mmlu(tmp_path, shots=shots).examples("test")
            assert (row.prompt, row.completion, row.answer, row.group) == (prompt, " D", "D", "abstract algebra")
        with pytest.raises(MiLoraError, match="shots is 5, but abstract algebra has 2 solved questions"):
            Mmlu(tmp_path).examples("test")
        with pytest.raises(MiLoraError, match="shots is -1"):
            Mmlu(tmp_path, shots=-1)
        with pytest.raises(MiLoraError, match="mmlu has no split 'train'; its splits: test"):
            Mmlu(tmp_path).examples("train")

    def test_the_authors_files_without_header_and_with_letters(self, tmp_path: Path) -> None:
        write(tmp_path, "test", "What is 2 + 2?,1,2,3,4,D\n")
        assert [(row.prompt, row.answer) for row in Mmlu(tmp_path, shots=0).examples("test")] == [(ZERO_SHOT, "D")]

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ("q,1,2,3,1\n", "line 3: 5 columns, it must have question, choice0, "),
            ("q,1,2,3,4,4\n", "line 3: 4 choices and the answer '4', it must be four and 0 to 3 or A to D"),
            ("q,1,2,3,4,\n", "line 3: 4 choices and the answer '', "),
            (" ,1,2,3,4,1\n", "line 3: `question` is empty"),
            ('"q,1,2,3,4,1\n', "line 3: this is not CSV: unexpected end of data"),
        ],
    )
    def test_bad_rows(self, tmp_path: Path, row: str, message: str) -> None:
        write(tmp_path, "test", TEST + row)
        with pytest.raises(DataError) as caught:
            Mmlu(tmp_path, shots=0).examples("test")
        assert f"abstract_algebra_test.csv, {message}" in str(caught.value)

    def test_a_file_without_questions(self, tmp_path: Path) -> None:
        write(tmp_path, "test", HEADER)
        with pytest.raises(DataError, match=r"abstract_algebra_test\.csv has no questions: .*choice0"):
            Mmlu(tmp_path, shots=0).examples("test")

    def test_no_files(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"mmlu/test: no files \*_test\.csv; .*from the hub \(cais/mmlu\)"):
            Mmlu(tmp_path, shots=0).examples("test")

    def test_a_subject_that_is_none(self, tmp_path: Path) -> None:
        write(tmp_path, "test", TEST, "cookery")
        with pytest.raises(DataError, match="MMLU has no subject 'cookery'; its subjects: abstract algebra, "):
            MmluSubject(tmp_path).examples("train")


def test_hub_and_files_give_the_same_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    text = Value("string")
    features = Features(
        {"question": text, "subject": text, "choices": List(text), "answer": ClassLabel(names=["A", "B", "C", "D"])}
    )
    calls = []
    rows = {
        "dev": [("What is 1 + 1?", ["1", "2", "3", "4"], 1), ("One, two,\nthree?", ["4", "5", "6", "7"], 0)],
        "test": [("What is 2 + 2?", ["1", "2", "3", "4"], 3)],
    }

    def load_split(name: str, split: str, config: str | None) -> Dataset:
        calls.append((name, split, config))
        records = [
            {"question": question, "subject": "abstract_algebra", "choices": choices, "answer": answer}
            for question, choices, answer in rows[split]
        ]
        return Dataset.from_list(records, features=features)

    monkeypatch.setattr(mmlu, "load_split", load_split)
    assert [row.prompt for row in Mmlu(shots=2).examples("test")] == [TWO_SHOT]
    assert sorted(calls) == [("cais/mmlu", "dev", "all"), ("cais/mmlu", "test", "all")]
    assert Counter(row.answer for split in ("train", "dev", "test") for row in MmluSubject().examples(split)) == {
        "abstract algebra": 1
    }
    rows["test"] = [("What is 2 + 2?", ["1", "2", "3"], 3)]
    with pytest.raises(DataError, match=r"cais/mmlu \(test\), row 1: 3 choices and the answer '3'"):
        Mmlu(shots=0).examples("test")


@pytest.mark.parametrize(
    ("output", "letter"),
    [(" B", "B"), ("B\n\nWhat is 3?\nA. 1\nAnswer: C", "B"), ("The answer is (b).", "B"), ("E", None), ("", None)],
)
def test_parse(output: str, letter: str | None) -> None:
    assert Mmlu().parse(output) == letter
