"""Benchmark files to rows with the columns that lm-eval's tasks expect of the hub's datasets."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from milora.errors import DataError

MMLU_HEADER = ("question", "choice0", "choice1", "choice2", "choice3", "answer")


def read_mmlu(file: Path) -> list[dict[str, Any]]:
    """Rows of `question`, `choices` (four) and `answer` (0 to 3) from a CSV file with the columns of `MMLU_HEADER`.

    Raises:
        DataError: If the file cannot be read, has another header, or a row is not of this form, with its line.
    """
    with file.open(newline="", encoding="utf-8-sig") as handle:
        reader = csv.reader(handle)
        try:
            header = next(reader, [])
            if tuple(header) != MMLU_HEADER:
                raise DataError(f"{file}, line 1: the header must be {','.join(MMLU_HEADER)}; found {','.join(header)}")
            return [_mmlu_row(cells, f"{file}, line {reader.line_num}") for cells in reader if cells]
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{file}, line {reader.line_num + 1}: not CSV in UTF-8: {error}") from error


def read_bbh(file: Path) -> list[dict[str, Any]]:
    """Rows of `input` and `target` from a JSON file `{"examples": [...]}`.

    Raises:
        DataError: If the file is not of this form, with the row, counted from 1.
    """
    content = _json(file.read_bytes(), str(file))
    if not isinstance(content, dict) or not isinstance(content.get("examples"), list):
        raise DataError(f'{file}: there must be a list of rows under "examples"')
    return [
        _strings(record, ("input", "target"), f"{file}, row {number}")
        for number, record in enumerate(content["examples"], start=1)
    ]


def read_gsm8k(file: Path) -> list[dict[str, Any]]:
    """Rows of `question` and `answer` (ending in `#### N`) from JSON lines.

    Raises:
        DataError: If a line is not of this form, with its number.
    """
    return [
        _strings(_json(line, f"{file}, line {number}"), ("question", "answer"), f"{file}, line {number}")
        for number, line in enumerate(file.read_bytes().split(b"\n"), start=1)
        if line.strip()
    ]


def _mmlu_row(cells: list[str], where: str) -> dict[str, Any]:
    if len(cells) != len(MMLU_HEADER):
        raise DataError(f"{where}: {len(MMLU_HEADER)} columns are needed; found {len(cells)}")
    question, *choices, answer = cells
    if answer not in ("0", "1", "2", "3"):
        raise DataError(f"{where}: the answer must be the index of a choice, 0 to 3; found {answer!r}")
    return {"question": question, "choices": choices, "answer": int(answer)}


def _json(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error


def _strings(record: Any, columns: tuple[str, ...], where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(f"{where}: a row must be an object with {' and '.join(columns)}")
    for column in columns:
        if not isinstance(record.get(column), str):
            raise DataError(f"{where}: the row needs a string {column!r}; found {record.get(column)!r}")
    return {column: record[column] for column in columns}
