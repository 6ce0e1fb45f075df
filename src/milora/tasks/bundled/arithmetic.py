"""Word problems with a chain of thought."""

from __future__ import annotations

import random
from dataclasses import dataclass

from milora.tasks.bundled.base import GeneratedTask
from milora.tasks.bundled.world import GAINS, ITEMS, LARGEST, LOSSES, NAMES
from milora.tasks.task import Example


@dataclass(frozen=True)
class Story:
    """A count of things that changes in steps. Each step is a verb and an amount; all numbers are single digits."""

    name: str
    item: str
    first: int
    steps: tuple[tuple[str, int], ...]

    @property
    def text(self) -> str:
        """The story as text."""
        told = "".join(f" {self.name} {verb} {amount}." for verb, amount in self.steps)
        return f"{self.name} had {self.first} {self.item}.{told}"

    @property
    def working(self) -> str:
        """The calculations in order: `7 - 2 = 5, 5 + 3 = 8`."""
        number, lines = self.first, []
        for verb, amount in self.steps:
            sign, result = ("-", number - amount) if verb in LOSSES else ("+", number + amount)
            lines.append(f"{number} {sign} {amount} = {result}")
            number = result
        return ", ".join(lines)

    @property
    def result(self) -> int:
        """The final count."""
        return self.first + sum(-amount if verb in LOSSES else amount for verb, amount in self.steps)

    @classmethod
    def draw(cls, rng: random.Random, steps: int) -> Story:
        """A random story with this number of steps."""
        first = number = rng.randint(1, LARGEST - 1)
        told = []
        for _ in range(steps):
            loses = number > 1 and (number == LARGEST or rng.random() < 0.5)
            amount = rng.randint(1, number - 1 if loses else LARGEST - number)
            told.append((rng.choice(LOSSES if loses else GAINS), amount))
            number += -amount if loses else amount
        return cls(rng.choice(NAMES), rng.choice(ITEMS), first, tuple(told))


class ArithmeticTask(GeneratedTask):
    """Stories about a count of things. The completion calculates step by step; the last result is the answer."""

    name = "bundled-arithmetic"
    max_new_tokens = 20

    def draw(self, rng: random.Random) -> tuple[Example, str]:
        """See [`GeneratedTask.draw`]."""
        story = Story.draw(rng, 2)
        prompt = f"Problem: {story.text} How many {story.item} has {story.name} now?\nSolution:"
        return Example(prompt, f" correct: {story.working}", str(story.result)), story.text

    def parse(self, output: str) -> str | None:
        """The last result of the chain."""
        return self.said(output, r"(?:\d+ [-+] \d+ = \d+, )*\d+ [-+] \d+ = (\d+)")
