"""A few hundred requests of `scripts/fuzz_serve.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "fuzz_serve.py"


@pytest.mark.slow
def test_no_crash_no_5xx_and_nothing_of_another_tenant() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--requests", "300", "--seed", "11"], capture_output=True, text=True, check=False
    )
    result = json.loads(done.stdout)
    assert result["failures"] == []
    assert done.returncode == 0
    assert result["statuses"]["200"] > 50
    assert result["statuses"]["400"] > 50
