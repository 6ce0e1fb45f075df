"""What `milora` raises when the user, not the program, has to change something."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MiLoraError(ValueError):
    """A user's mistake: the message, one line, names the thing, what was found, and the fix."""


class DataError(MiLoraError):
    """Rows that cannot be read as training or evaluation data: the message names the file and the line or row."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause for the end of a message, `; did you mean 'arc-easy'?`, or nothing when no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
