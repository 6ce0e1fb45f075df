"""Locks between processes, held by the system, which lets go when a process dies."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from milora_core.errors import MiLoraError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)

FOLDER_LOCK = ".lock"
"""The lock of a folder as a whole; see [`alone_in`]."""


class NoLocksError(MiLoraError):
    """The system, or the file system, has no locks."""


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Holds a lock for as long as the block runs, and yields whether it could be had.

    It is an advisory `flock`: a process that is killed loses it at once, so a lock can never be stale. The file stays
    behind, as another process may be about to lock it; while the lock is held it says by whom (see [`holder`]), and at
    other times it means nothing.

    Args:
        path: The lock's file; made where it is missing.
        wait: Whether to wait until it can be had.

    Raises:
        NoLocksError: If the system or the file system has no such locks.
        MiLoraError: If the file cannot be made.
    """
    if fcntl is None:
        raise NoLocksError(f"{path} cannot be locked: this system has no flock; Linux, macOS and WSL have it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise MiLoraError(f"The lock {path} cannot be made: {error.strerror}.") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise NoLocksError(
                f"{path} cannot be locked ({error.strerror}): name a folder on a file system with locks."
            ) from error
        _write_holder(descriptor, f"process {os.getpid()} on {platform.node()}")
        try:
            yield True
        finally:
            _write_holder(descriptor, "")
    finally:
        # Closing lets go of the lock. Python opens files so that child processes do not inherit them, and with them it.
        os.close(descriptor)


def holder(path: Path) -> str:
    """Who has a lock, for a message: `process 4711 on NAME`, or `another process` where the file does not say."""
    try:
        return path.read_text(encoding="utf-8") or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"


@contextmanager
def alone_in(folder: Path, advice: str) -> Iterator[None]:
    """Keeps other processes that ask for the same out of a folder for as long as the block runs.

    Where there are no locks it says so on the log, and goes on: a file system without them is no reason not to work.

    Args:
        folder: Made where it is missing; its lock is the file `.lock`.
        advice: What to do when another process is there; the end of the message.

    Raises:
        MiLoraError: If another process is there, with its number; or the folder cannot be made.
    """
    path = folder / FOLDER_LOCK
    with ExitStack() as stack:
        try:
            is_mine = stack.enter_context(locked(path))
        except NoLocksError as error:
            _log.warning("%s Nothing keeps other processes out of %s meanwhile.", error, folder)
            is_mine = True
        if not is_mine:
            raise MiLoraError(f"{folder} is in use by {holder(path)}: {advice}.")
        yield


def _write_holder(descriptor: int, name: str) -> None:
    # The lock holds without it too: neither a full disk nor anything else may keep a process from what it locks.
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, name.encode(), 0)
