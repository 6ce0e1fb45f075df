"""SIGINT, SIGTERM and SIGHUP end a command with one line and the status 128 + signal, whenever they arrive."""

from __future__ import annotations

import os
import signal
from types import FrameType

_WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}
_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"

_ending = False


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to end.

    Attributes:
        status: The exit status, 128 + the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(_WORDS[signal.Signals(number).name])
        self.status = 128 + number


def handle_signals() -> None:
    """Installs the signal handlers of a command, in the main thread.

    They raise [`Interrupted`], so `finally` blocks remove incomplete files. During imports they end the process at
    once: C extensions would turn the exception into an `ImportError`, and a bare `except` would drop it.

    Signals that the parent process ignores (`nohup`, background jobs of a script) stay ignored.
    """
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            # A forked worker ends as its parent expects.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif _ending or _is_importing(frame):
            end_now(Interrupted(number))
        raise Interrupted(number)

    for name in _WORDS:
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, handle)


def end_on_signals() -> None:
    """From now on a signal ends the process at once: the command is done, and Python cleans up."""
    global _ending
    _ending = True


def end_now(interrupted: Interrupted) -> None:
    """Ends the process with the line and the status of a signal, without any clean-up."""
    try:
        os.write(2, f"milora: {interrupted}\n".encode())
    finally:
        os._exit(interrupted.status)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT_SYSTEM:
            return True
        frame = frame.f_back
    return False
