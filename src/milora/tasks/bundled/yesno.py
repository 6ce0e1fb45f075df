"""Yes or no to a question about a short passage."""

from __future__ import annotations

import random
from dataclasses import dataclass

from milora.tasks.bundled.base import GeneratedTask
from milora.tasks.bundled.world import NAMES, THINGS
from milora.tasks.task import Example


@dataclass(frozen=True)
class Lunch:
    """A passage about who eats what, and a claim that someone eats something."""

    eaten: dict[str, str]
    asked: str
    claimed: str

    @property
    def passage(self) -> str:
        """The passage: each name is followed by the food."""
        return ", ".join(f"{name} {thing}" for name, thing in self.eaten.items())

    @property
    def truth(self) -> str:
        """The food that the person in the claim eats."""
        return self.eaten[self.asked]

    @property
    def is_true(self) -> bool:
        """Whether the claim is true."""
        return self.claimed == self.truth

    @classmethod
    def draw(cls, rng: random.Random, people: int) -> Lunch:
        """A random lunch with this number of people. Half of the claims are true; false ones name another's food."""
        names, things = rng.sample(NAMES, people), rng.sample(THINGS, people)
        asked = rng.randrange(people)
        claimed = asked if rng.random() < 0.5 else rng.choice([i for i in range(people) if i != asked])
        return cls(dict(zip(names, things, strict=True)), names[asked], things[claimed])


class YesNoTask(GeneratedTask):
    """Yes/no questions about who eats what. The completion states the truth first."""

    name = "bundled-yesno"
    max_new_tokens = 12

    def draw(self, rng: random.Random) -> tuple[Example, str]:
        """See [`GeneratedTask.draw`]."""
        lunch = Lunch.draw(rng, 3)
        answer = "yes" if lunch.is_true else "no"
        prompt = f"Passage: For lunch, {lunch.passage}.\nQuestion: Does {lunch.asked} eat {lunch.claimed}?\nAnswer:"
        return Example(prompt, f" correct: {lunch.asked} {lunch.truth}, {answer}", answer), lunch.passage

    def parse(self, output: str) -> str | None:
        """The verdict at the end of an output."""
        return self.said(output, r"\w+ \w+, (yes|no)")
