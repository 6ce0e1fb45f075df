"""Folders with real task data. A test that needs one is skipped, with a reason, if the folder is missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA_DIR = Path(os.environ.get("MILORA_DATA_DIR", Path(__file__).resolve().parents[3] / "shared" / "data"))


def real(folder: str) -> Path:
    """The data folder, if it contains this path."""
    if not (DATA_DIR / folder).is_dir():
        pytest.skip(f"no {folder} in {DATA_DIR}: set MILORA_DATA_DIR to a folder of the benchmarks' files")
    return DATA_DIR
