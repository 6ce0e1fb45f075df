"""All tasks by name: MiLoRA's, other distributions', and those registered in this process."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable

from milora.plugins import TASK_GROUP, plugins
from milora.tasks.alpaca import Alpaca
from milora.tasks.aqua import Aqua
from milora.tasks.arc import ArcChallenge, ArcEasy
from milora.tasks.bbh import Bbh
from milora.tasks.boolq import BoolQ
from milora.tasks.bundled import BUNDLED_TASKS
from milora.tasks.gsm8k import Gsm8k
from milora.tasks.mmlu import Mmlu
from milora.tasks.mmlu_subject import MmluSubject
from milora.tasks.mt_bench import MtBench
from milora.tasks.obqa import OpenBookQA
from milora.tasks.piqa import Piqa
from milora.tasks.shop import SHOP_TASKS
from milora.tasks.task import Task
from milora_core.errors import MiLoraError, did_you_mean

GENERATED_TASKS: dict[str, Task] = {**BUNDLED_TASKS, **SHOP_TASKS}
"""The tasks that need no data, by name."""

_BENCHMARKS: dict[str, Callable[..., Task]] = {
    task.name: task
    for task in (
        ArcEasy,
        ArcChallenge,
        OpenBookQA,
        Piqa,
        BoolQ,
        Aqua,
        Gsm8k,
        Mmlu,
        Bbh,
        MtBench,
        Alpaca,
        MmluSubject,
    )
}


def names() -> list[str]:
    """The names of all tasks: generated tasks (they need no data), public benchmarks, then other distributions' tasks.

    Raises:
        MiLoraError: another distribution's task cannot be loaded.
    """
    return [*GENERATED_TASKS, *_benchmarks()]


def register(name: str, task: Callable[..., Task]) -> None:
    """Adds a task for this process. A distribution adds tasks with entry points in the group `milora.tasks`.

    Args:
        name: The name for `--task` and [`get`].
        task: A [`milora.tasks.task.Task`] class, or any function that returns a task. It is called with `data_dir`, a
            folder or `None`; its other parameters are the task's settings.

    Raises:
        MiLoraError: a task with this name exists.
    """
    if name in names():
        raise MiLoraError(f"there is a task {name!r} already; choose another name")
    _BENCHMARKS[name] = task


def get(name: str, data_dir: str | os.PathLike[str] | None = None, **settings: int) -> Task:
    """The task with this name. A benchmark reads its rows from `data_dir`, or from the hub if it is `None`.

    Args:
        name: One of [`names`].
        data_dir: A folder with one sub-folder per benchmark.
        settings: Further arguments of the benchmark's class: `shots` for `mmlu` and `bbh`.

    Raises:
        MiLoraError: no task has this name, or the task has no such setting.
    """
    if name not in names():
        raise MiLoraError(f"there is no task {name!r}; tasks: {', '.join(names())}{did_you_mean(name, names())}")
    benchmark = _benchmarks().get(name)
    known = set() if benchmark is None else set(inspect.signature(benchmark).parameters) - {"data_dir"}
    if unknown := sorted(settings.keys() - known):
        has = f"; its settings: {', '.join(sorted(known))}" if known else ", and no other"
        raise MiLoraError(f"the task {name} has no setting {unknown[0]!r}{has}")
    return GENERATED_TASKS[name] if benchmark is None else benchmark(data_dir, **settings)


def _benchmarks() -> dict[str, Callable[..., Task]]:
    # MiLoRA's tasks take precedence over another distribution's task of the same name.
    return _BENCHMARKS | {name: task for name, task in plugins(TASK_GROUP).items() if name not in _BENCHMARKS}
