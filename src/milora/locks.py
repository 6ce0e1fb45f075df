"""Locks a folder or a file against a second writing process."""

from __future__ import annotations

import errno
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from milora_core.errors import MiLoraError

FOLDER_LOCK = ".lock"
"""The lock's file in the folder. It is not deleted; its existence alone has no meaning."""

_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP)

_log = logging.getLogger(__name__)


@contextmanager
def writing_alone(
    folder: Path, advice: str = "wait until it ends, or use another folder", name: str = FOLDER_LOCK
) -> Iterator[None]:
    """Reserves a folder for this process while the block runs.

    The operating system holds the lock (`filelock.FileLock`), so a killed process leaves none behind. A second lock by
    the same process is refused too. If several processes work together, one of them takes the lock.

    On a file system without locks it logs a warning and runs the block anyway.

    Args:
        folder: The folder; it is created if missing.
        advice: How to resolve the conflict; the end of the error.
        name: The lock's file in the folder. `Trainer.push_to_hub` leaves out files whose names begin with `_`.

    Raises:
        MiLoraError: Another process uses the folder (the error names it), or the folder cannot be created or written
            to.
    """
    with _reserved(folder, folder / name, advice):
        yield


@contextmanager
def writing_file_alone(path: Path, advice: str = "wait until it ends, or name another output") -> Iterator[None]:
    """Like [`writing_alone`] for a file, or a folder that is written at once: the lock is a hidden file next to it.

    The lock's file is removed at the end. A process that waited for the removed file tries again.
    """
    path = Path(os.path.realpath(path))
    lock = path.parent / f".{path.name}.lock"
    with _reserved(path, lock, advice):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def _reserved(what: Path, path: Path, advice: str) -> Iterator[None]:
    lock: BaseFileLock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise MiLoraError(f"{what} is in use by {_holder(path)}: {advice}.") from error
    except FileExistsError as error:
        raise MiLoraError(f"{path.parent} is a file: name a folder.") from error
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise MiLoraError(f"{what} cannot be written to: {error.strerror or error}.") from error
        _log.warning("%s: the file system has no locks; do not start a second process that writes to it.", what)
    else:
        # filelock changes its class if the file system has no flock. Then its file is the lock and must not be changed.
        if not isinstance(lock, SoftFileLock):
            # The lock also works without the name, for example on a full disk.
            with suppress(OSError):
                path.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
    try:
        yield
    finally:
        lock.release()


def _holder(path: Path) -> str:
    # On Windows no other process can read a locked file.
    with suppress(OSError, UnicodeDecodeError):
        return " ".join(path.read_text(encoding="utf-8").split()) or "another process"
    return "another process"
