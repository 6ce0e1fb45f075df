"""Rows from a file: JSON lines, or a JSON array as LLM-Adapters has it. The file's name decides which."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

from milora.tasks.rows import Row, read_records
from milora_core.errors import DataError

LINE_SUFFIXES = (".jsonl", ".ndjson")
ARRAY_SUFFIX = ".json"
FILE_SUFFIXES = (*LINE_SUFFIXES, ARRAY_SUFFIX)


def read_file(path: Path) -> list[Row]:
    """Every row of a file; blank lines of JSON lines are skipped, a byte order mark is taken off.

    Raises:
        DataError: the file cannot be opened, is not UTF-8, is of an unknown format or empty, or has a line (JSON lines)
            or a row (JSON array) that is not JSON or not a row. The message gives its number, counted from 1.
    """
    return read_records(read_values(path), str(path))


def read_values(path: Path) -> Iterator[tuple[str, object]]:
    """The JSON values of a file that has a value a row, whatever they are, each with the place it stands at.

    Raises:
        DataError: as [`read_file`], but for the rows' shape.
    """
    suffix = path.suffix.lower()
    if suffix not in FILE_SUFFIXES:
        raise DataError(
            f"{path}: files that end in {suffix!r} are not read; convert it to JSON lines (.jsonl, a row a line) "
            "or to a JSON array (.json)"
        )
    text = read_text(path)
    if not text.strip():
        raise DataError(f"{path} is empty")
    return _lines(path, text) if suffix in LINE_SUFFIXES else _array(path, text)


def read_json(path: Path) -> object:
    """The one JSON value of a file.

    Raises:
        DataError: the file cannot be opened, is not UTF-8 or is not JSON.
    """
    return _parse(read_text(path), str(path))


def read_text(path: Path) -> str:
    """A file's text, without a byte order mark.

    Raises:
        DataError: the file cannot be opened or is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path} is not UTF-8 but UTF-16: save it as UTF-8")
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8: save the file as UTF-8"
        ) from error


def _lines(path: Path, text: str) -> Iterator[tuple[str, object]]:
    # `str.splitlines` would also cut at U+2028 and its like, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _parse(line, where)


def _array(path: Path, text: str) -> Iterator[tuple[str, object]]:
    array = _parse(text, str(path))
    if not isinstance(array, list):
        raise DataError(f"{path} holds one JSON value, it must hold an array of rows (or name it .jsonl, a row a line)")
    for number, record in enumerate(array, start=1):
        yield f"{path}, row {number}", record


def _parse(text: str, where: str) -> object:
    """One JSON value.

    Raises:
        DataError: the text is none, with the place in it and what is there.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        many_lines = "\n" in text.strip()
        place = f"line {error.lineno}, column {error.colno}" if many_lines else f"column {error.colno}"
        found = text[error.pos : error.pos + 20]
        hint = "; if every line is a row, name the file .jsonl" if many_lines and error.msg == "Extra data" else ""
        raise DataError(f"{where}: not JSON: {error.msg} at {place}, found {found!r}{hint}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or a nesting as deep
        raise DataError(f"{where}: not JSON that can be read: {error}") from error
