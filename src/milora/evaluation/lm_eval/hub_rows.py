"""Converts benchmark files to rows with the columns of the hub's datasets, which lm-eval's tasks expect.

`milora.tasks` reads the files; this module only renames the columns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from milora.tasks.bbh import read_task
from milora.tasks.fields import check_fields
from milora.tasks.files import read_values
from milora.tasks.gsm8k import Gsm8k
from milora.tasks.mmlu import LETTERS, read_subject


def read_mmlu(file: Path) -> list[dict[str, Any]]:
    """Rows of `question`, `choices` (four) and `answer` (0 to 3); see [`milora.tasks.mmlu.read_subject`].

    Raises:
        DataError: If the file cannot be read, with the line.
    """
    return [
        {"question": question.text, "choices": list(question.choices), "answer": LETTERS.index(question.answer)}
        for question in read_subject(file, file.stem)
    ]


def read_bbh(file: Path) -> list[dict[str, Any]]:
    """Rows of `input` and `target`; see [`milora.tasks.bbh.read_task`].

    Raises:
        DataError: If the file cannot be read, with the row.
    """
    return [dict(row) for row in read_task(file)]


def read_gsm8k(file: Path) -> list[dict[str, Any]]:
    """Rows of `question` and `answer` (ending in `#### N`), from the original JSON lines.

    Raises:
        DataError: If the file cannot be read, with the line.
    """
    rows = (check_fields(record, Gsm8k.hub_columns, where) for where, record in read_values(file))
    return [{column: row[column] for column in Gsm8k.hub_columns} for row in rows]
