"""Public benchmarks: what they share wherever their rows come from, and a dev split where a benchmark has none."""

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
"""How much of the rows is held out,"""

LARGEST_DEV = 500
"""and how many at most."""


class PublicTask(Task):
    """A benchmark that others publish: from a folder of files, `data_dir`, or from the hub without one.

    Its rows are loaded once, when they are first asked for.
    """

    def __init__(self, data_dir: str | os.PathLike[str] | None = None):
        self.data_dir = None if data_dir is None else Path(data_dir)
        self._loaded: dict[str, list[Example]] = {}

    def examples(self, split: Split, count: int | None = None, seed: int = 0) -> Sequence[Example]:
        """The first `count` rows of a split (all that there are with `None`), shuffled by `seed`.

        Raises:
            MiLoraError: there is no such split, or `count` is negative.
            DataError: the rows cannot be found or read, or one has no gold answer of the task's kind.
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
        """Every row of a split that the task has, in the source's order.

        Raises:
            DataError: the rows cannot be found or read, or one has no gold answer of the task's kind.
        """


def hold_out(
    rows: Sequence[T],
    share: float = DEV_SHARE,
    seed: int = 0,
    group: Callable[[T], str] = attrgetter("prompt"),
) -> tuple[list[T], list[T]]:
    """What remains to train on, and a dev set; the order within each stays.

    Rows of one group stay on one side. The dev set is a share of the groups, and at least one where there are several:
    but for those that would make it larger than [`LARGEST_DEV`] rows, or than half of all. The choice depends on
    nothing but the groups and the seed, so that with one seed no run trains on another's dev rows, whatever the files'
    order.

    Args:
        rows: The rows.
        share: Of the groups, above 0 and below 1.
        seed: Decides which groups.
        group: Of a row; by default its prompt.
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
