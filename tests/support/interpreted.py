"""Runs the `interpreted` tests of a file in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys


def run_interpreted(file: str, passed: int) -> None:
    """Runs them in another process, because the interpreter is chosen when a kernel is defined.

    Args:
        file: The test file.
        passed: The number of tests that must pass.
    """
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-m", "interpreted"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert f"{passed} passed" in run.stdout, run.stdout
