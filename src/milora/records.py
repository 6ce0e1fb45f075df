"""Append-only files of JSON lines, which a later run goes on with where an earlier one was cut off."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from milora_core.errors import DataError


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Adds a line in one write, so that processes and threads that share the file do not mix theirs.

    Raises:
        OSError: If the disk is full; what was written of the line is taken back.
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
    """The records of a file, each with the place it stands at; half a line at the end is passed over.

    Raises:
        DataError: If there is no such file, or a whole line is no JSON object.
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
    """Cuts off what a killed process left of its last line; for a process that has the file to itself."""
    if not path.exists():
        return
    content = path.read_bytes()
    complete = content.rfind(b"\n") + 1
    if complete != len(content):
        os.truncate(path, complete)
