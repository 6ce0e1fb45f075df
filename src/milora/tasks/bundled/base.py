"""Base of the bundled tasks: rows from a seeded stream, and disjoint splits."""

from __future__ import annotations

import abc
import hashlib
import random
import re
from collections.abc import Iterator
from itertools import islice

from milora.tasks.task import SPLITS, Example, Split, Task
from milora_core.errors import MiLoraError

TRAIN_SHARE = 0.8
DEFAULT_ROWS: dict[str, int] = {"train": 2000, "dev": 200, "test": 400}


class GeneratedTask(Task):
    """A task that generates its rows.

    A hash of a row's content determines its split, so the splits are disjoint for every count and seed. The number of
    rows is unlimited; without a `count`, a split has [`DEFAULT_ROWS`] rows. With the same seed, a larger `count` starts
    with the rows of a smaller one.
    """

    def examples(self, split: Split, count: int | None = None, seed: int = 0) -> list[Example]:
        """The first `count` rows of the stream of `seed` that belong to the split."""
        if split not in SPLITS:
            raise MiLoraError(f"A split is one of {', '.join(SPLITS)}; found {split!r}.")
        return list(islice(self._stream(split, seed), DEFAULT_ROWS[split] if count is None else count))

    @staticmethod
    def said(output: str, pattern: str) -> str | None:
        """The text after "correct:" in the first line of an output, if it matches `pattern`, else `None`."""
        lines = output.strip().splitlines()
        found = re.match(rf"correct: {pattern}(?=\W|$)", lines[0]) if lines else None
        return found[1] if found else None

    @abc.abstractmethod
    def draw(self, rng: random.Random) -> tuple[Example, str]:
        """A random row, and the content that determines its split. Training never sees the content of test rows."""

    def _stream(self, split: Split, seed: int) -> Iterator[Example]:
        rng = random.Random(f"{self.name}/{seed}")
        seen = set()
        while True:
            example, content = self.draw(rng)
            if split_of(content) == split and example.prompt not in seen:
                seen.add(example.prompt)
                yield example


def split_of(content: str) -> str:
    """The split of a content, the same on every machine: 80 % train, 10 % dev, 10 % test."""
    digest = hashlib.blake2b(content.encode(), digest_size=8).digest()
    share = int.from_bytes(digest, "big") / 2**64
    if share < TRAIN_SHARE:
        return "train"
    return "dev" if share < (1 + TRAIN_SHARE) / 2 else "test"
