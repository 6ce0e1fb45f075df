"""Which state of the code made a result."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path


@cache
def revision() -> str | None:
    """The git revision that the package is imported from, `-changed` where files differ from it; `None` outside git.

    Asked once a process, whose code stays what it was when it started.
    """
    package = Path(__file__).resolve().parents[1]
    commit = _git(package, "rev-parse", "--short=12", "HEAD")
    # An installed package may lie inside somebody else's repository, which does not track it.
    if not commit or not _git(package, "ls-files", "__init__.py"):
        return None
    return f"{commit}-changed" if _git(package, "status", "--porcelain", "--", ".") else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
