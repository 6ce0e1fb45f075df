"""Yes/no questions about a short passage."""

from __future__ import annotations

import random
import re

from milora.tasks.bundled.base import GeneratedTask
from milora.tasks.bundled.world import invented_passage, passage_text
from milora.tasks.task import Example


class YesNoTask(GeneratedTask):
    """Does the passage say so? A wrong value is always that of someone else in the passage."""

    name = "bundled-yesno"
    max_new_tokens = 12

    def draw(self, rng: random.Random) -> tuple[Example, str]:
        """One passage with a question; the passage decides the split."""
        statements = invented_passage(rng, people=3)
        asked, other = rng.sample(statements, 2)
        answer = rng.choice(("yes", "no"))
        question = asked.say(asked.relation.is_it_so, asked.value if answer == "yes" else other.value)
        passage = passage_text(statements)
        prompt = f"Passage: {passage}\nQuestion: {question}\nAnswer:"
        return Example(prompt, f" {self.completion_start} {answer}", answer), passage

    def parse(self, output: str) -> str | None:
        """`yes` or `no` after "the correct answer is"."""
        found = re.search(rf"{self.completion_start}:? (yes|no)\b", output, re.IGNORECASE)
        return found[1].lower() if found else None
