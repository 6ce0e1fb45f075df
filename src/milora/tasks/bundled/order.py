"""Putting numbers in order."""

from __future__ import annotations

import random
import re

from milora.tasks.bundled.base import GeneratedTask
from milora.tasks.task import Example

NUMBERS = 3


class OrderTask(GeneratedTask):
    """Three numbers of two digits, to be sorted from small to large or from large to small."""

    name = "bundled-order"
    max_new_tokens = 24

    def draw(self, rng: random.Random) -> tuple[Example, str]:
        """One list; the numbers as a set decide the split, whatever their order."""
        numbers = rng.sample(range(10, 100), NUMBERS)
        falling = rng.random() < 0.5
        direction = "from large to small" if falling else "from small to large"
        answer = _listing(sorted(numbers, reverse=falling))
        prompt = f"Sort {direction}: {_listing(numbers)}\nAnswer:"
        return Example(prompt, f" {self.completion_start} {answer}", answer), _listing(sorted(numbers))

    def parse(self, output: str) -> str | None:
        """The list of numbers after "the correct answer is"."""
        found = re.search(rf"{self.completion_start}:? (\d+(?:, ?\d+)*)", output, re.IGNORECASE)
        return _listing(found[1].split(",")) if found else None


def _listing(numbers: list[int] | list[str]) -> str:
    return ", ".join(str(number).strip() for number in numbers)
