"""SmolLM2-135M-Instruct, for tests of what random models cannot show."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder that `make smollm2` makes; without it the tests that use it are skipped."""
    named = os.environ.get("MILORA_SMOLLM2")
    folder = Path(named).expanduser() if named else Path.home() / ".cache" / "milora" / "smollm2-135m-instruct"
    if not (folder / "config.json").is_file():
        pytest.skip(f"no real language model in {folder}: run `make smollm2`")
    return folder
