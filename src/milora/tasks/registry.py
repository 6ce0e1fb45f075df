"""Every task by its name."""

from __future__ import annotations

import os

from milora.errors import MiLoraError, did_you_mean
from milora.tasks.arc import ArcChallenge, ArcEasy
from milora.tasks.boolq import BoolQ
from milora.tasks.bundled import BUNDLED_TASKS
from milora.tasks.label import LabelTask
from milora.tasks.task import Task

_BENCHMARKS: dict[str, type[LabelTask]] = {task.name: task for task in (ArcEasy, ArcChallenge, BoolQ)}


def names() -> list[str]:
    """The names of all tasks: the bundled ones, which need no data, then the public benchmarks."""
    return [*BUNDLED_TASKS, *_BENCHMARKS]


def get(name: str, data_dir: str | os.PathLike[str] | None = None) -> Task:
    """The task of a name; a benchmark reads `data_dir` (LLM-Adapters' layout), or the hub without it.

    Raises:
        MiLoraError: no task has this name.
    """
    if name in BUNDLED_TASKS:
        return BUNDLED_TASKS[name]
    if name in _BENCHMARKS:
        return _BENCHMARKS[name](data_dir)
    raise MiLoraError(f"there is no task {name!r}; tasks: {', '.join(names())}{did_you_mean(name, names())}")
