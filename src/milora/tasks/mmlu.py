"""MMLU (Hendrycks et al. 2021): questions with four choices on 57 subjects, with the prompts of its authors' code."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from milora.tasks.answers import find_letter
from milora.tasks.fields import check_fields
from milora.tasks.files import read_text
from milora.tasks.hub import load_split
from milora.tasks.public import PublicTask
from milora.tasks.task import Example, Split
from milora_core.errors import DataError, MiLoraError

LETTERS = "ABCD"
FOLDER = "mmlu"
HUB_ID = "cais/mmlu"
HUB_CONFIG = "all"
HUB_COLUMNS: dict[str, type] = {"question": str, "subject": str, "choices": list, "answer": int}

CSV_HEADER = ["question", *(f"choice{number}" for number in range(len(LETTERS))), "answer"]


@dataclass(frozen=True)
class Question:
    """A question, its choices in order and the letter of the correct one. `subject` has spaces, not underscores."""

    subject: str
    text: str
    choices: tuple[str, ...]
    answer: str

    def posed(self) -> str:
        """The question, its lettered choices (one per line) and `Answer:`, which the model completes."""
        lines = (f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=True))
        return "\n".join([self.text.strip(), *lines, "Answer:"])


class Mmlu(PublicTask):
    """MMLU's test rows with few-shot prompts. The answer is a letter, `A` to `D`.

    The prompt is a line that names the subject, then the solved questions (the subject's dev rows, in their order),
    then the question; each question ends in `Answer:`. The completion is a space and the letter. The authors' code and
    the public harnesses use the same prompt, without an instruction template. An example's `group` is its subject.

    Args:
        data_dir: A folder that contains `mmlu/dev/*_dev.csv` and `mmlu/test/*_test.csv`; the hub if `None`.
        shots: Number of solved questions, 0 to 5.
    """

    name = "mmlu"
    max_new_tokens = 16
    splits: ClassVar[tuple[str, ...]] = ("test",)
    differs = (
        "The letter is read from what is generated after five solved questions. Figures of lm-eval (`milora lm-eval`), "
        "which compares how likely the four letters are, are others."
    )

    def __init__(self, data_dir: str | os.PathLike[str] | None = None, shots: int = 5):
        super().__init__(data_dir)
        if shots < 0:
            raise MiLoraError(f"shots is {shots}, it must be 0 or more")
        self.shots = shots

    def load(self, split: Split) -> list[Example]:
        """All rows of a split, subject by subject."""
        solved: dict[str, list[Question]] = {}
        if self.shots:
            for question in read_questions(self.data_dir, "dev"):
                solved.setdefault(question.subject, []).append(question)
        return [
            self._example(question, solved.get(question.subject, []))
            for question in read_questions(self.data_dir, split)
        ]

    def parse(self, output: str) -> str | None:
        """The letter that a text gives before its first empty line, or `None`. Later text is ignored.

        See [`milora.tasks.answers.find_letter`].
        """
        return find_letter(output.strip().partition("\n\n")[0], LETTERS)

    def _example(self, question: Question, solved: list[Question]) -> Example:
        if len(solved) < self.shots:
            raise MiLoraError(f"shots is {self.shots}, but {question.subject} has {len(solved)} solved questions")
        header = f"The following are multiple choice questions (with answers) about {question.subject}.\n\n"
        shots = "".join(f"{shot.posed()} {shot.answer}\n\n" for shot in solved[: self.shots])
        return Example(f"{header}{shots}{question.posed()}", f" {question.answer}", question.answer, question.subject)


def read_questions(data_dir: Path | None, split: str) -> list[Question]:
    """The questions of `dev` or `test`, subject by subject.

    Files are `{data_dir}/mmlu/{split}/{subject}_{split}.csv`; see [`read_subject`].

    Raises:
        DataError: there are no files, a file cannot be read, or a row is not a question.
    """
    if data_dir is None:
        dataset = load_split(HUB_ID, split, HUB_CONFIG)
        source = f"{HUB_ID} ({split})"
        return [_from_record(row, f"{source}, row {number}") for number, row in enumerate(dataset, start=1)]
    folder = data_dir / FOLDER / split
    files = sorted(folder.glob(f"*_{split}.csv"))
    if not files:
        raise DataError(
            f"{folder}: no files *_{split}.csv; the data folder must hold {FOLDER}/dev and {FOLDER}/test, a CSV file a "
            f"subject; without a data folder, mmlu comes from the hub ({HUB_ID})"
        )
    return [question for path in files for question in read_subject(path, path.stem.removesuffix(f"_{split}"))]


def read_subject(path: Path, subject: str) -> list[Question]:
    """The unchanged questions of a CSV file.

    The columns are `question`, `choice0` to `choice3` and `answer` (the index of a choice), with a header line. The
    authors' files, which have no header and a letter as the answer, are supported too.

    Raises:
        DataError: the file cannot be read, has no questions, or a row is not a question. The message gives the line.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    questions = []
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if row == CSV_HEADER or not row:
                continue
            if len(row) != len(CSV_HEADER):
                raise DataError(f"{where}: {len(row)} columns, it must have {', '.join(CSV_HEADER)}")
            text, *choices, answer = row
            questions.append(_question(subject, text, choices, answer, where))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: this is not CSV: {error}") from error
    if not questions:
        raise DataError(f"{path} has no questions: it must have a row for each, of {', '.join(CSV_HEADER)}")
    return questions


def _from_record(record: Mapping[str, Any], where: str) -> Question:
    row = check_fields(record, HUB_COLUMNS, where)
    return _question(row["subject"], row["question"], row["choices"], str(row["answer"]), where)


def _question(subject: str, text: str, choices: list[str], answer: str, where: str) -> Question:
    keys = [str(number) for number in range(len(LETTERS))]
    letter = LETTERS[keys.index(answer)] if answer in keys else answer
    if letter not in list(LETTERS) or len(choices) != len(LETTERS):
        raise DataError(
            f"{where}: {len(choices)} choices and the answer {answer!r}, it must be four and 0 to 3 or A to D"
        )
    if not text.strip():
        raise DataError(f"{where}: `question` is empty")
    return Question(subject.replace("_", " "), text, tuple(choices), letter)
