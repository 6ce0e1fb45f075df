"""Multiple choice: which of four answers is a fact of the closed world."""

from __future__ import annotations

import random
import re

from milora.tasks.bundled.base import GeneratedTask
from milora.tasks.bundled.world import TOPICS
from milora.tasks.task import Example

CHOICES = 4


class ChoiceTask(GeneratedTask):
    """A question of knowledge with the answers `answer1` to `answer4`."""

    name = "bundled-choice"
    max_new_tokens = 12

    def draw(self, rng: random.Random) -> tuple[Example, str]:
        """One question; the question with its set of options decides the split, whatever their order."""
        topic = rng.choice(TOPICS)
        subject = rng.choice(sorted(topic.facts))
        options = [topic.facts[subject]]
        options += rng.sample(sorted(set(topic.facts.values()) - set(options)), CHOICES - 1)
        rng.shuffle(options)
        question = topic.question.format(subject=subject)
        listing = "\n".join(f"answer{number}: {option}" for number, option in enumerate(options, start=1))
        answer = f"answer{options.index(topic.facts[subject]) + 1}"
        example = Example(f"{question}\n{listing}\nAnswer:", f" {self.completion_start} {answer}", answer)
        return example, f"{question} {sorted(options)}"

    def parse(self, output: str) -> str | None:
        """`answer1` to `answer4` after "the correct answer is"."""
        found = re.search(rf"{self.completion_start}:? (answer[1-{CHOICES}])\b", output, re.IGNORECASE)
        return found[1].lower() if found else None
