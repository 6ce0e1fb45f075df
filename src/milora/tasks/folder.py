"""The default folder of the benchmarks' files."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "MILORA_DATA_DIR"
"""The environment variable that names the folder."""


def data_folder(given: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder from which a command reads benchmarks, with a leading `~` expanded; `None` means the hub.

    Args:
        given: The command's argument, which takes precedence over a non-empty `MILORA_DATA_DIR`.
    """
    named = given or os.environ.get(VARIABLE)
    return Path(named).expanduser() if named else None
