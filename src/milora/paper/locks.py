"""A lock for each run, so that processes can share a folder: held by the system, which lets go when a process dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from milora.errors import MiLoraError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Holds a lock for as long as the block runs, and yields whether it could be had.

    It is an advisory `flock`: a process that is killed loses it at once, so a lock can never be stale, and the file
    that stays behind means nothing. It is not taken away, as another process may be about to lock it.

    Args:
        path: The lock's file; made where it is missing.
        wait: Whether to wait until it can be had.

    Raises:
        MiLoraError: If the system or the file system has no such locks, or the file cannot be made.
    """
    if fcntl is None:
        raise MiLoraError("Runs are locked with flock, which this system does not have: use Linux, macOS or WSL.")
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
            raise MiLoraError(
                f"{path} cannot be locked ({error.strerror}): give an --output on a file system with locks."
            ) from error
        yield True
    finally:
        # Closing lets go of the lock. Python opens files so that child processes do not inherit them, and with them it.
        os.close(descriptor)
