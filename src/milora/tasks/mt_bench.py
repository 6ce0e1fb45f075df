"""MT-Bench (Zheng et al. 2023): 80 questions of two turns in eight categories, answered freely and judged by a model.

The questions have no gold answers, so the task has no rows and no parser. `milora.evaluation.mt_bench` uses the
questions.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NoReturn

from milora.tasks.fields import check_fields
from milora.tasks.files import read_values
from milora.tasks.hub import load_split
from milora.tasks.task import Example, Split, Task
from milora_core.errors import DataError, MiLoraError

FOLDER = "mt_bench"
QUESTION_FILE = "question.jsonl"
REFERENCE_FILES = ("reference_answer/gpt-4.jsonl", "reference_answer_gpt-4.jsonl")
HUB_ID = "HuggingFaceH4/mt_bench_prompts"
FIRST_ID = 81
REFERENCE_CATEGORIES = ("reasoning", "math", "coding")
"""The categories in which FastChat's judge gets a reference answer."""

_TURNS = 2


@dataclass(frozen=True)
class Question:
    """A question with several turns.

    `turns` are the user's messages. `references` has one answer per turn for the judge, or is empty if the question has
    no reference answers.
    """

    id: int
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...] = ()


class MtBench(Task):
    """MT-Bench as a named task. It has [`questions`][MtBench.questions] and no rows."""

    name = "mt-bench"
    max_new_tokens = 1024
    splits: ClassVar[tuple[str, ...]] = ()

    def __init__(self, data_dir: str | os.PathLike[str] | None = None):
        self.data_dir = None if data_dir is None else Path(data_dir)

    def questions(self) -> list[Question]:
        """The questions; see [`load_questions`]."""
        return load_questions(self.data_dir)

    def examples(self, split: Split, count: int | None = None, seed: int = 0) -> Sequence[Example]:
        """MT-Bench has no rows.

        Raises:
            MiLoraError: always.
        """
        self._refuse("has no rows with a gold answer")

    def parse(self, output: str) -> str | None:
        """MT-Bench has no parser.

        Raises:
            MiLoraError: always.
        """
        self._refuse("has no answer that is right or wrong")

    def _refuse(self, why: str) -> NoReturn:
        raise MiLoraError(
            f"{self.name} {why}: its 80 questions are answered in two turns and judged by a model; "
            "use `milora evaluate --task mt-bench`, and another task to train on"
        )


def load_questions(data_dir: str | os.PathLike[str] | None = None) -> list[Question]:
    """The questions in FastChat's order, with their references.

    With a `data_dir`, the questions come from `{data_dir}/mt_bench/question.jsonl` (or `{data_dir}/question.jsonl`).
    The references are GPT-4's answers in `reference_answer/gpt-4.jsonl` or `reference_answer_gpt-4.jsonl` in the same
    folder (30 questions, those of [`REFERENCE_CATEGORIES`]). Without such a file, the questions' short `reference`
    fields are used in these categories.

    Without a `data_dir`, the questions come from the hub, which has only the `reference` fields. Its rows have no
    `question_id`; they are numbered from 81 in FastChat's order.

    Raises:
        DataError: a file or the dataset cannot be read, a row lacks a field, a question does not have two turns, two
            questions have the same id, or a reference belongs to no question.
    """
    if data_dir is None:
        return [
            _question(
                {"question_id": number, "turns": row.get("prompt"), **row}, f"{HUB_ID}, row {number - FIRST_ID + 1}"
            )
            for number, row in enumerate(load_split(HUB_ID, "train"), start=FIRST_ID)
        ]
    folder = question_folder(data_dir)
    path = folder / QUESTION_FILE
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; the data folder must hold {FOLDER}/{QUESTION_FILE} as FastChat has it; "
            f"without a data folder, mt-bench comes from the hub ({HUB_ID})"
        )
    questions: dict[int, Question] = {}
    for where, record in read_values(path):
        question = _question(record, where)
        if question.id in questions:
            raise DataError(f"{where}: `question_id` {question.id} is there twice")
        questions[question.id] = question
    files = [folder / name for name in REFERENCE_FILES if (folder / name).is_file()]
    if not files:
        return list(questions.values())
    references: dict[int, tuple[str, ...]] = {}
    for where, record in read_values(files[0]):
        number, turns = _reference(record, where)
        if number not in questions:
            raise DataError(f"{where}: a reference for question {number}, which is not in {path}")
        references[number] = turns
    return [replace(question, references=references.get(question.id, ())) for question in questions.values()]


def question_folder(data_dir: str | os.PathLike[str]) -> Path:
    """The folder of the questions: `mt_bench` in the data folder if it exists, else the data folder."""
    root = Path(data_dir)
    return root / FOLDER if (root / FOLDER).is_dir() else root


def _question(record: object, where: str) -> Question:
    fields = check_fields(record, {"question_id": int, "category": str, "turns": list}, where)
    turns = tuple(fields["turns"])
    if len(turns) != _TURNS:
        raise DataError(f"{where}: question {fields['question_id']} has {len(turns)} turns, it must have {_TURNS}")
    own = check_fields({"reference": fields.get("reference") or []}, {"reference": list}, where)["reference"]
    # Some references answer only one turn. In other categories they are remarks, not answers.
    complete = fields["category"] in REFERENCE_CATEGORIES and len(own) == _TURNS and all(own)
    return Question(fields["question_id"], fields["category"], turns, tuple(own) if complete else ())


def _reference(record: object, where: str) -> tuple[int, tuple[str, ...]]:
    """The question's id and the answers to its turns, from a record in FastChat's answer format."""
    fields = check_fields(record, {"question_id": int}, where)
    choices = fields.get("choices")
    if not isinstance(choices, list) or not choices:
        raise DataError(f"{where}: `choices` must be a list with one answer; fields found: {', '.join(fields)}")
    turns = check_fields(choices[0], {"turns": list}, f"{where}, `choices[0]`")["turns"]
    if len(turns) != _TURNS:
        raise DataError(f"{where}: a reference of {len(turns)} turns, it must have {_TURNS}")
    return fields["question_id"], tuple(turns)
