"""What goes where: results to standard output, everything else to standard error."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PrintResult: TypeAlias = Callable[[Mapping[str, Any]], None]


@contextmanager
def json_only(active: bool) -> Iterator[PrintResult]:
    """With `--json`, keeps standard output free for one JSON object, whatever libraries print meanwhile.

    Yields:
        A function that prints the result as JSON, and does nothing when not `active`.
    """
    if not active:
        yield lambda result: None
        return
    stdout = sys.stdout
    is_unicode = codecs.lookup(stdout.encoding or "utf-8").name.startswith("utf")

    def print_result(result: Mapping[str, Any]) -> None:
        # NaN is not JSON: better a failure here than in the program that reads it.
        print(json.dumps(result, ensure_ascii=not is_unicode, allow_nan=False), file=stdout, flush=True)

    with redirect_stdout(sys.stderr):
        yield print_result


def progress_bar() -> Progress:
    """A progress bar on standard error that leaves nothing behind; silent where that is no terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def quiet_libraries() -> None:
    """Takes progress bars and advice of the libraries off standard error, where a user's mistake gets one line."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
