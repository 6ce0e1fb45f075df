"""Output streams: results go to standard output, everything else to standard error."""

from __future__ import annotations

import codecs
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from milora_core.errors import MiLoraError

WIDEST = 1000
"""A width in characters that exceeds any table."""

PrintResult: TypeAlias = Callable[[Mapping[str, Any]], None]


@contextmanager
def json_only(active: bool) -> Iterator[PrintResult]:
    """With `--json`, reserves standard output for one JSON object. Output of libraries goes to standard error.

    Yields:
        A function that prints the result as JSON if `active`, and does nothing otherwise.
    """
    if not active:
        yield lambda result: None
        return
    stdout = sys.stdout
    is_unicode = codecs.lookup(stdout.encoding or "utf-8").name.startswith("utf")

    def print_result(result: Mapping[str, Any]) -> None:
        # NaN is not valid JSON: fail here, not in the program that reads it.
        print(json.dumps(result, ensure_ascii=not is_unicode, allow_nan=False), file=stdout, flush=True)

    with redirect_stdout(sys.stderr):
        yield print_result


@contextmanager
def reserved(outputs: Sequence[Path], example: str) -> Iterator[None]:
    """Locks the files of `--output` against other processes while the block runs; fails before the work, not after.

    Devices and pipes may be shared.

    Args:
        outputs: The files.
        example: An example file name for the error if one is a folder.

    Raises:
        MiLoraError: If one is a folder, in use by another process, or in a folder that cannot be written to.
    """
    from milora.locks import writing_file_alone

    with ExitStack() as locks:
        for path in {Path(os.path.realpath(path)): path for path in outputs}.values():
            if path.is_dir():
                raise MiLoraError(f"--output {path} is a folder: give a file, such as {path / example}.")
            if path.is_file() or not path.exists():
                locks.enter_context(writing_file_alone(path, "wait until it ends, or use another --output"))
        yield


def print_table(table: Table) -> None:
    """Prints a table on standard output without cutting words, even if it is wider than the terminal."""
    console = Console()
    wide = Console(width=WIDEST)
    for column in table.columns:
        if column.no_wrap:
            # rich would cut these columns before exceeding the width.
            texts = [column.header, *column.cells, column.footer]
            column.min_width = max(wide.measure(text).maximum for text in texts)
    wanted = wide.measure(table)
    console.width = max(console.width, wanted.minimum) if console.is_terminal else wanted.maximum
    console.print(table)


def progress_bar() -> Progress:
    """A transient progress bar on standard error; silent if that is not a terminal."""
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
    """Silences progress bars and advice of the libraries, so a user's mistake is one line on standard error."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
