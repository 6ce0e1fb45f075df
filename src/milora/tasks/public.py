"""The base class of public benchmarks, and a held-out dev split for benchmarks without one."""

from __future__ import annotations

import abc
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TypeVar

from milora.tasks.task import Example, Split, Task, check_split
from milora_core.errors import MiLoraError

T = TypeVar("T")

DEV_SHARE = 0.1
"""The share of the rows that is held out for dev."""

LARGEST_DEV = 500
"""The maximum number of rows held out for dev."""


class PublicTask(Task):
    """A published benchmark, read from a folder of files (`data_dir`), or from the hub if `data_dir` is `None`.

    Rows are loaded once, on first use.
    """

    def __init__(self, data_dir: str | os.PathLike[str] | None = None):
        self.data_dir = None if data_dir is None else Path(data_dir)
        self._loaded: dict[str, list[Example]] = {}

    def examples(self, split: Split, count: int | None = None, seed: int = 0) -> Sequence[Example]:
        """The first `count` rows of a split (all rows with `None`), shuffled with `seed`.

        Raises:
            MiLoraError: there is no such split, or `count` is negative.
            DataError: the rows cannot be found or read, or a gold answer is not valid for the task.
        """
        split = check_split(self.name, split, self.splits)
        if count is not None and count < 0:
            raise MiLoraError(f"count is {count}, it must be 0 or more, or None for all rows")
        if split not in self._loaded:
            self._loaded[split] = self.load(split)
        rows = list(self._loaded[split])
        random.Random(f"{self.name} {split} {seed}").shuffle(rows)
        return rows[:count]

    @abc.abstractmethod
    def load(self, split: Split) -> list[Example]:
        """All rows of a split that the task has, in the source's order.

        Raises:
            DataError: the rows cannot be found or read, or a gold answer is not valid for the task.
        """


def hold_out(
    rows: Sequence[T],
    share: float = DEV_SHARE,
    seed: int = 0,
    group: Callable[[T], str] = attrgetter("prompt"),
) -> tuple[list[T], list[T]]:
    """Splits rows into a train and a dev set, each in the original order.

    Rows of one group are in the same set. The dev set is a share of the groups, at least one if there are several. A
    group is skipped if it would make the dev set larger than [`LARGEST_DEV`] rows or than half of all rows. The choice
    depends only on the groups and the seed, so runs with the same seed have the same dev rows in any order of the file.

    Args:
        rows: The rows.
        share: Share of the groups to hold out, above 0 and below 1.
        seed: Seed of the choice.
        group: Function from a row to its group; by default the row's prompt.
    """
    sizes = Counter(map(group, rows))
    count = min(LARGEST_DEV, max(1, int(len(sizes) * share)), len(sizes) - 1)
    held: set[str] = set()
    room = min(LARGEST_DEV, len(rows) // 2)
    for name in random.Random(seed).sample(sorted(sizes), max(count, 0)):
        if sizes[name] <= room:
            held.add(name)
            room -= sizes[name]
    return [row for row in rows if group(row) not in held], [row for row in rows if group(row) in held]
