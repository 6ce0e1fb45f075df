"""Files of results: append-only JSON lines, which a later run reads where an earlier one was cut off, and whole files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from milora.errors import DataError, MiLoraError


@contextmanager
def writing(path: Path, kept: str = "") -> Iterator[None]:
    """Turns what the system raises while a file is written (a full disk, no permission) into a user's error.

    Args:
        path: The file.
        kept: What is not lost, and how to go on; the end of the message.

    Raises:
        MiLoraError: The file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise MiLoraError(f"{path} cannot be written: {error.strerror or error}{kept}") from error


def append_record(path: Path, record: Mapping[str, Any], kept: str = "") -> None:
    """Adds a line, in one write, so that processes and threads that share the file do not mix theirs.

    Args:
        path: The file; its folder is made where it is missing.
        record: What becomes the line.
        kept: What to say is not lost, should the disk be full.

    Raises:
        MiLoraError: The line cannot be written as a whole.
    """
    line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
    with writing(path, kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            written = os.write(descriptor, line)
            while written < len(line):
                # A disk that fills up takes a part; only the next attempt says why.
                written += os.write(descriptor, line[written:])
        finally:
            os.close(descriptor)


def read_records(path: Path, *, cut: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a file, each with the place it stands at; half a line at the end, left by a kill, is left out.

    Args:
        path: The file.
        cut: Whether half a line is cut off the file too, so that it can be appended to.

    Raises:
        DataError: If there is no such file, or a whole line is no JSON object.
        MiLoraError: If half a line cannot be cut off.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if cut and complete != content:
        with writing(path):
            os.truncate(path, len(complete))
    for number, line in enumerate(complete.split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: not a JSON object")
        yield f"{path}, line {number}", record


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file by way of a temporary one beside it, so that no reader sees a part of it.

    Raises:
        MiLoraError: The file cannot be written; what was there before is left.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1) + "\n", "utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
