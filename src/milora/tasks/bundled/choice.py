"""Multiple-choice questions with four options."""

from __future__ import annotations

import random
from collections.abc import Sequence

from milora.tasks.bundled.base import GeneratedTask
from milora.tasks.bundled.world import FACTS
from milora.tasks.task import Example

OPTIONS = 4


def draw_question(rng: random.Random) -> tuple[str, str, str, list[str]]:
    """A question's beginning, its subject, the correct value, and four options in random order."""
    beginning = rng.choice(list(FACTS))
    subject, value = rng.choice(list(FACTS[beginning].items()))
    others = sorted(set(FACTS[beginning].values()) - {value})
    options = [value, *rng.sample(others, OPTIONS - 1)]
    rng.shuffle(options)
    return beginning, subject, value, options


def listing(options: Sequence[str], label: str) -> str:
    """The options as text, each followed by its label."""
    return ", ".join(f"{option} {label}{index}" for index, option in enumerate(options, start=1))


class ChoiceTask(GeneratedTask):
    """Multiple choice with the labels `answer1` to `answer4`. The completion states the fact, then the label."""

    name = "bundled-choice"
    max_new_tokens = 10

    def draw(self, rng: random.Random) -> tuple[Example, str]:
        """See [`GeneratedTask.draw`]."""
        beginning, subject, value, options = draw_question(rng)
        answer = f"answer{options.index(value) + 1}"
        listed = listing(options, "answer")
        prompt = f"{beginning} {subject}? Options: {listed}.\nAnswer:"
        return Example(prompt, f" correct: {subject} {value} {answer}", answer), f"{subject} {listed}"

    def parse(self, output: str) -> str | None:
        """The label at the end of an output."""
        return self.said(output, r"\w+ \w+ (answer[1-4])")
