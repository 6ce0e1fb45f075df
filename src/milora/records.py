"""Append-only files of JSON lines, which a later run continues after an interruption."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from milora_core.errors import DataError


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Appends a line in one write, so processes and threads that share the file do not mix their lines.

    Raises:
        OSError: If the disk is full; the incomplete line is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        written = os.write(descriptor, line)
        if written < len(line):
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a file, each with its location; an incomplete last line is skipped.

    Raises:
        DataError: If there is no such file, or a complete line is not a JSON object.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise DataError(f"{where}: not a JSON object")
        yield where, record


def drop_half_line(path: Path) -> None:
    """Removes an incomplete last line of a killed process; only for a process with exclusive access to the file."""
    if not path.exists():
        return
    content = path.read_bytes()
    complete = content.rfind(b"\n") + 1
    if complete != len(content):
        os.truncate(path, complete)
