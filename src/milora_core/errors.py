"""Errors that the user, not the program, can fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class MiLoraError(ValueError):
    """A user's mistake. The message is one line: what is wrong, what was found, and the fix."""


class MissingExtraError(MiLoraError, ImportError):
    """An optional library is not installed. The message names the extra that installs it."""


class DataError(MiLoraError):
    """Rows cannot be read as training or evaluation data. The message names the file and the line or row."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause for the end of a message, `; did you mean 'arc-easy'?`, or nothing when no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


@contextmanager
def importing(extra: str, purpose: str) -> Iterator[None]:
    """Names the extra to install if a library that the block imports is missing.

    Args:
        extra: As in `pip install "milora[extra]"`.
        purpose: What needs it; the beginning of the message.

    Raises:
        MissingExtraError: A module that is not part of this project cannot be found.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library.startswith("milora"):
            raise
        raise MissingExtraError(f'{purpose} needs {library}: pip install "milora[{extra}]"') from error
