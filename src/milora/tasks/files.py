"""Reads text and rows from files and standard input: JSON lines, or a JSON array in LLM-Adapters' format.

Users' rows and prompts are all read here, with the same rules: UTF-8 with or without a byte order mark, lines that end
in LF or CRLF, and strict JSON.
"""

from __future__ import annotations

import codecs
import json
import sys
from collections import Counter
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml

from milora.tasks.rows import Row, read_records
from milora_core.errors import DataError

LINE_SUFFIXES = (".jsonl", ".ndjson")
ARRAY_SUFFIX = ".json"
FILE_SUFFIXES = (*LINE_SUFFIXES, ARRAY_SUFFIX)

STANDARD_INPUT = "-"
"""The path that stands for standard input."""


def read_file(path: Path) -> list[Row]:
    """All rows of a file. Blank lines in JSON lines are skipped. A byte order mark is removed.

    Raises:
        DataError: the file cannot be opened, is not UTF-8, is of an unknown format or empty, or has a line (JSON lines)
            or a row (JSON array) that is not JSON or not a row. The message gives its number, counted from 1.
    """
    return read_records(read_values(path), str(path))


def read_values(path: Path) -> Iterator[tuple[str, object]]:
    """The JSON values of a file, one per row, each with its location. Standard input and pipes contain JSON lines.

    Raises:
        DataError: as [`read_file`]. The format of the rows is not checked.
    """
    suffix = path.suffix.lower()
    if is_stream(path):
        suffix = LINE_SUFFIXES[0]
    if suffix not in FILE_SUFFIXES:
        raise DataError(
            f"{path}: files that end in {suffix!r} are not read; convert it to JSON lines (.jsonl, a row a line) "
            "or to a JSON array (.json)"
        )
    text = read_text(path)
    if not text.strip():
        raise DataError(f"{_name(path)} is empty")
    return _lines(path, text) if suffix in LINE_SUFFIXES else _array(path, text)


def read_json(path: Path) -> object:
    """The JSON value of a file.

    Raises:
        DataError: the file cannot be opened, is not UTF-8 or is not JSON.
    """
    return _parse(read_text(path), str(path))


def read_yaml(path: Path) -> object:
    """The YAML document of a file.

    Raises:
        DataError: the file cannot be opened, is not UTF-8, is not YAML or repeats a key.
    """
    text = read_text(path)
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise DataError(f"{path}{line}: not YAML that can be read: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


class _StrictLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                problem = f"the key {key.value!r} is given twice: keep one of them"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            keys.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_text_lines(path: Path) -> list[str]:
    """The non-blank lines of a text file, without LF or CRLF.

    Raises:
        DataError: as [`read_text`].
    """
    return [line.removesuffix("\r") for line in read_text(path).split("\n") if line.strip()]


def read_text(path: Path) -> str:
    """The text of a file, or of standard input for [`STANDARD_INPUT`], without a byte order mark.

    Raises:
        DataError: the file cannot be opened or is not UTF-8.
    """
    name = _name(path)
    try:
        content = _read_standard_input() if str(path) == STANDARD_INPUT else path.read_bytes()
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}") from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{name} is not UTF-8 but UTF-16: save it as UTF-8")
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8: save the file as UTF-8"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{name}, line {line}: a NUL byte is not text; if the file is UTF-16, save it as UTF-8")
    return text


def is_stream(path: Path) -> bool:
    """Whether a path is standard input, a pipe or a device. Their names do not indicate a format."""
    return str(path) == STANDARD_INPUT or (path.exists() and not path.is_file() and not path.is_dir())


def _name(path: Path) -> str:
    return "standard input" if str(path) == STANDARD_INPUT else str(path)


def _read_standard_input() -> bytes:
    # `sys.stdin` is None if the descriptor was closed before Python started.
    return b"" if sys.stdin is None else sys.stdin.buffer.read()


def _lines(path: Path, text: str) -> Iterator[tuple[str, object]]:
    # `str.splitlines` also splits at U+2028 and similar characters, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{_name(path)}, line {number}"
            yield where, _parse(line, where)


def _array(path: Path, text: str) -> Iterator[tuple[str, object]]:
    array = _decode(text, str(path))
    if not isinstance(array, list):
        raise DataError(f"{path} holds one JSON value, it must hold an array of rows (or name it .jsonl, a row a line)")
    for number, record in enumerate(array, start=1):
        where = f"{path}, row {number}"
        yield where, _unambiguous(record, where)


def _parse(text: str, where: str) -> object:
    """Parses one JSON value.

    Raises:
        DataError: the text is not JSON. The message has the position and the text found there.
    """
    return _unambiguous(_decode(text, where), where)


class _Repeated(dict[str, object]):
    """An object whose JSON text repeats `key`."""

    key: str


def _decode(text: str, where: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        many_lines = "\n" in text.strip()
        place = f"line {error.lineno}, column {error.colno}" if many_lines else f"column {error.colno}"
        found = text[error.pos : error.pos + 20]
        hint = "; if every line is a row, name the file .jsonl" if many_lines and error.msg == "Extra data" else ""
        raise DataError(f"{where}: not JSON: {error.msg} at {place}, found {found!r}{hint}") from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or very deep nesting
        raise DataError(f"{where}: not JSON that can be read: {error}") from error


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    repeated = _Repeated(fields)
    repeated.key = Counter(key for key, _ in pairs).most_common(1)[0][0]
    return repeated


def _refuse_constant(constant: str) -> object:
    raise ValueError(f"{constant} is not a number in JSON")


def _unambiguous(value: object, where: str) -> object:
    """The value, after a check that no object repeats a key: JSON parsers disagree on which value counts."""
    parts = [value]
    while parts:
        part = parts.pop()
        if isinstance(part, _Repeated):
            raise DataError(f"{where}: the key {part.key!r} is given twice: keep one of them")
        if isinstance(part, dict | list):
            parts.extend(part.values() if isinstance(part, dict) else part)
    return value
