"""The standard streams of a command: open, able to print any text, and named in errors."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

OUTPUT = "standard output"


class _Output(io.FileIO):
    """Standard output. Its errors name it as their file."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = OUTPUT
            raise


def prepare_streams() -> None:
    """Makes standard input, output and error safe to use.

    - A closed descriptor is replaced, so no other file gets its number. Printing to a closed standard output
      fails; messages for a closed standard error are dropped.
    - Text that standard output cannot encode is printed as backslash escapes.
    - An `OSError` of standard output has [`OUTPUT`] as its file name.
    """
    # With these modes, reading a closed input and writing to a closed output still fail (as in gnulib's stdopen).
    for descriptor, mode in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, mode)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
    if sys.stderr is None:
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding="utf-8", write_through=True)
    encoding = "utf-8" if sys.stdout is None else sys.stdout.encoding
    raw = _Output(1, "w", closefd=False)
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace", line_buffering=raw.isatty()
    )


def close_progress_bars() -> None:
    """Ends the libraries' progress bars on standard error, so the next message has its own line and stays last."""
    tqdm = sys.modules.get("tqdm")
    for bar in list(getattr(getattr(tqdm, "tqdm", None), "_instances", ())):
        bar.leave = True
        bar.close()


def drop_output() -> None:
    """Discards unwritten output, so Python does not try to write it again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
