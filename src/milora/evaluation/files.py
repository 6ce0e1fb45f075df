"""Writing results: whole or not at all, and what the system says of a full disk as a user's error."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from milora.errors import MiLoraError


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
