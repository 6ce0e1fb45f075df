"""Reads lm-eval's task files. Only this module and the model class use lm-eval's private parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks._yaml_loader import load_yaml


def task_files(families: Sequence[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yields the files of lm-eval's tasks and groups in some of its folders, with the fields of included files."""
    root = Path(lm_eval.__file__).parent / "tasks"
    for family in families:
        for path in sorted((root / family).rglob("*.yaml")):
            yield path, load_yaml(path, resolve_func=False)
