"""Every task by its name."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable

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
from milora.tasks.task import Task
from milora_core.errors import MiLoraError, did_you_mean

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
    """The names of all tasks: the bundled ones, which need no data, then the public benchmarks."""
    return [*BUNDLED_TASKS, *_BENCHMARKS]


def get(name: str, data_dir: str | os.PathLike[str] | None = None, **settings: int) -> Task:
    """The task of a name; a benchmark reads `data_dir`, or the hub without it.

    Args:
        name: One of [`names`].
        data_dir: A folder with a folder a benchmark.
        settings: What the benchmark's class takes besides: `shots` of `mmlu` and `bbh`.

    Raises:
        MiLoraError: no task has this name, or the task has no such setting.
    """
    if name not in names():
        raise MiLoraError(f"there is no task {name!r}; tasks: {', '.join(names())}{did_you_mean(name, names())}")
    known = set(inspect.signature(_BENCHMARKS[name]).parameters) - {"data_dir"} if name in _BENCHMARKS else set()
    if unknown := sorted(settings.keys() - known):
        has = f"; its settings: {', '.join(sorted(known))}" if known else ", and no other"
        raise MiLoraError(f"the task {name} has no setting {unknown[0]!r}{has}")
    return BUNDLED_TASKS[name] if name in BUNDLED_TASKS else _BENCHMARKS[name](data_dir, **settings)
