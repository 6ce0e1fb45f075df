"""Files that are written completely or not at all, and errors for full disks.

[`milora.records`] writes files that grow line by line.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from milora_core.errors import MiLoraError

_IN_WORDS = re.compile(r"\(os error (\d+)\)")
"""How libraries written in Rust, such as safetensors, report a system error."""

_NOT_TO_ITS_END = ("PytorchStreamWriter failed", "basic_ios::clear", "unexpected pos")
"""How `torch.save`, which hides the system error, reports a file that could not be written completely."""


@contextmanager
def writing(path: Path, kept: str = "") -> Iterator[None]:
    """Turns system errors while writing (a full disk, no permission) into a user's error.

    Args:
        path: The file or folder.
        kept: What is kept and how to continue; the end of the message.

    Raises:
        MiLoraError: It cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise MiLoraError(f"{path} cannot be written: {_reason(error)}{kept}") from error
    except Exception as error:
        number = errno.ENOSPC if is_disk_full(error) else _number_in_words(error)
        if number is None:
            raise
        raise MiLoraError(f"{path} cannot be written: {_reason(OSError(number, os.strerror(number)))}{kept}") from error


@contextmanager
def whole_file(path: Path, kept: str = "") -> Iterator[Path]:
    """Yields a temporary path beside `path` to write to, and renames it to `path` when the block ends.

    A reader of `path` always finds the old file or the new one, never a partial one:

    - an exception or an interruption in the block keeps the old file and deletes the temporary one;
    - so does a full disk, even if the system reports it only when the last bytes are flushed;
    - a killed process leaves the old file and a hidden `.partial` file next to it, which nothing reads and you may
      delete;
    - after a power cut it is either of the two: contents are flushed to the disk before the rename (`fsync`, a few
      milliseconds).

    If several processes write the same file, the last one wins. A link is replaced, not followed.

    Args:
        path: The file; missing parent folders are created.
        kept: See [`writing`].

    Raises:
        MiLoraError: It cannot be written. Other exceptions of the block are raised unchanged.
    """
    partial = _beside(path)
    with writing(path, kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            _put_on_disk(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, kept: str = "") -> Iterator[Path]:
    """Like [`whole_file`] for a folder: yields an empty folder to write to and renames it to `path` at the end.

    Args:
        path: A folder that does not exist, or is empty.
        kept: See [`writing`].

    Raises:
        MiLoraError: It cannot be written, or exists and is not empty.
    """
    partial = _beside(path)
    with writing(path, kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.mkdir()
            yield partial
            for file in filter(Path.is_file, partial.rglob("*")):
                _put_on_disk(file)
            os.replace(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def require_writable(folder: Path) -> None:
    """Creates a folder and checks that files can be written to it, before their contents are computed.

    Raises:
        MiLoraError: They cannot.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")


def require_vacant(folder: Path) -> None:
    """Checks that [`whole_folder`] can write a folder, before its contents are computed.

    Raises:
        MiLoraError: It exists and is not an empty folder.
    """
    if folder.exists() and not folder.is_dir():
        raise MiLoraError(f"{folder} is a file: name a folder that does not exist yet.")
    if folder.exists() and any(folder.iterdir()):
        raise MiLoraError(f"{folder} is not an empty folder: name a folder that does not exist yet, or empty it.")


def write_text(path: Path, text: str, kept: str = "") -> None:
    """Writes a text in UTF-8 with [`whole_file`].

    Raises:
        MiLoraError: It cannot be written.
    """
    with whole_file(path, kept) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes results as indented JSON with [`whole_file`].

    Raises:
        MiLoraError: It cannot be written.
        ValueError: A number is not finite, which JSON cannot represent.
    """
    write_text(path, json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception, or one of its causes, reports a full disk.

    An incomplete write of `torch.save` counts as one.
    """
    seen: BaseException | None = error
    while seen is not None:
        numbers = {getattr(seen, "errno", None), _number_in_words(seen)}
        in_words = (os.strerror(errno.ENOSPC), *(_NOT_TO_ITS_END if isinstance(seen, RuntimeError) else ()))
        if numbers & {errno.ENOSPC, errno.EDQUOT} or any(words in str(seen) for words in in_words):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _reason(error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"{reason}, make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else reason


def _number_in_words(error: BaseException) -> int | None:
    found = _IN_WORDS.search(str(error))
    return int(found[1]) if found else None


def _beside(path: Path) -> Path:
    """A unique hidden name in the same folder, and so on the same disk."""
    return path.parent / f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial"


def _put_on_disk(file: Path) -> None:
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
