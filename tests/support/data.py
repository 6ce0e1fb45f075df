"""Where real task data may lie; a test that needs them is skipped, and says so, where they do not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA_DIR = Path(os.environ.get("MILORA_DATA_DIR", Path(__file__).resolve().parents[3] / "shared" / "data"))


def real(folder: str) -> Path:
    """The data folder, if it holds this one."""
    if not (DATA_DIR / folder).is_dir():
        pytest.skip(f"no {folder} in {DATA_DIR}: set MILORA_DATA_DIR to a folder of the benchmarks' files")
    return DATA_DIR
