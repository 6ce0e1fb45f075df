"""Files that are there whole or not at all, and a full disk as a user's error.

What grows by a line at a time is written by [`milora.records`].
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
"""How libraries that are written in Rust, such as safetensors, say what the system said."""

_NOT_TO_ITS_END = ("PytorchStreamWriter failed", "basic_ios::clear", "unexpected pos")
"""How `torch.save`, which does not say what the system said, says that a file could not be written to its end."""


@contextmanager
def writing(path: Path, kept: str = "") -> Iterator[None]:
    """Turns what the system raises while something is written (a full disk, no permission) into a user's error.

    Args:
        path: The file or folder.
        kept: What is not lost, and how to go on; the end of the message.

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
    """Yields a name beside `path` to write to; when the block ends, that file takes the place of `path`.

    Whoever opens `path`, at whatever time, finds the old file or the new one, never a part of one:

    - an exception or an interruption in the block leaves the old file, and takes away what was written;
    - so does a full disk, also where the system says so only when the last bytes are to be on the disk;
    - a process that is killed leaves the old file, and beside it a hidden one that ends in `.partial`, which nobody
      reads and anybody may delete;
    - after a power cut it is either of the two: contents are on the disk before the new file has its name (`fsync`, a
      few milliseconds, which no file here is written often enough to feel).

    Of several processes that write the same file the last one's stays. A link is replaced, not followed.

    Args:
        path: The file; folders above it are made.
        kept: As of [`writing`].

    Raises:
        MiLoraError: It cannot be written. Any other exception of the block is passed on as it is.
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
    """As [`whole_file`], for a folder: yields an empty one to write to, which then takes the place of `path`.

    Args:
        path: A folder that does not exist, or is empty.
        kept: As of [`writing`].

    Raises:
        MiLoraError: It cannot be written, or is there and not empty.
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
    """Makes a folder, and checks that files can be written to it, before the work on what they hold.

    Raises:
        MiLoraError: They cannot.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")


def require_vacant(folder: Path) -> None:
    """Checks that [`whole_folder`] can write a folder, before the work on its contents.

    Raises:
        MiLoraError: It exists and is not an empty folder.
    """
    if folder.exists() and not folder.is_dir():
        raise MiLoraError(f"{folder} is a file: name a folder that does not exist yet.")
    if folder.exists() and any(folder.iterdir()):
        raise MiLoraError(f"{folder} is not an empty folder: name a folder that does not exist yet, or empty it.")


def write_text(path: Path, text: str, kept: str = "") -> None:
    """Writes a text in UTF-8, by way of [`whole_file`].

    Raises:
        MiLoraError: It cannot be written.
    """
    with whole_file(path, kept) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes results as JSON that people can read too, by way of [`whole_file`].

    Raises:
        MiLoraError: It cannot be written.
        ValueError: A number is not finite, which JSON cannot say.
    """
    write_text(path, json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception, or one that it came from, says that there is no room left on a disk.

    Of one by `torch.save` it is taken for granted.
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
    """A hidden name in the same folder, and so on the same disk, that no other writer has."""
    return path.parent / f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial"


def _put_on_disk(file: Path) -> None:
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
