"""Public benchmarks: what they share wherever their rows come from, and a dev split where a benchmark has none."""

from __future__ import annotations

import abc
import os
import random
from collections.abc import Sequence
from pathlib import Path

from milora.errors import MiLoraError
from milora.tasks.task import Example, Split, Task, check_split

_DEV_SHARE = 10  # one row in ten,
_DEV_MOST = 500  # at most


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


def hold_out(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """What remains to train on, and a dev set: a tenth of the prompts, at most 500 and at least one.

    The choice depends on nothing but the prompts themselves, so that two runs with different seeds, or files in another
    order, never train on each other's dev rows.
    """
    prompts = sorted({example.prompt for example in examples})
    count = min(_DEV_MOST, max(1, len(prompts) // _DEV_SHARE))
    held = set(random.Random(0).sample(prompts, count))
    train = [example for example in examples if example.prompt not in held]
    return train, [example for example in examples if example.prompt in held]
