"""The folder of the benchmarks' files, where a command is given none."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "MILORA_DATA_DIR"
"""The environment variable that names the folder."""


def data_folder(given: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder that a command reads benchmarks from, with a `~` in front of it resolved; the hub where it is `None`.

    Args:
        given: What the command was given, which comes first; then comes `MILORA_DATA_DIR`, where it is not empty.
    """
    named = given or os.environ.get(VARIABLE)
    return Path(named).expanduser() if named else None
