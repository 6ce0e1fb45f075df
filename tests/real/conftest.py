"""SmolLM2-135M-Instruct, for tests that random models cannot cover."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder that `make smollm2` creates. Tests that use it are skipped without it."""
    named = os.environ.get("MILORA_SMOLLM2")
    folder = Path(named).expanduser() if named else Path.home() / ".cache" / "milora" / "smollm2-135m-instruct"
    if not (folder / "config.json").is_file():
        pytest.skip(f"no real language model in {folder}: run `make smollm2`")
    return folder
