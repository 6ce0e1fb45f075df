"""The files of lm-eval's own tasks: all that is touched of its private parts, besides its model class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks._yaml_loader import load_yaml


def task_files(families: Sequence[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The files of lm-eval's tasks and groups in some of its folders, with their own and their parents' fields."""
    root = Path(lm_eval.__file__).parent / "tasks"
    for family in families:
        for path in sorted((root / family).rglob("*.yaml")):
            yield path, load_yaml(path, resolve_func=False)
