"""Word problems, answered with a chain of calculations."""

from __future__ import annotations

import random
import re

from milora.tasks.bundled.base import GeneratedTask
from milora.tasks.bundled.world import calculation, invented_word_problem
from milora.tasks.task import Example


class ArithmeticTask(GeneratedTask):
    """A story of two calculations; the answer is the number after the last one."""

    name = "bundled-arithmetic"
    max_new_tokens = 40

    def draw(self, rng: random.Random) -> tuple[Example, str]:
        """One story; its chain of calculations decides the split, so that no tested chain was trained on."""
        problem = invented_word_problem(rng, changes=2)
        chain = " ".join(f"{calculation(*step)}." for step in problem.steps)
        question = f"How many {problem.item} does {problem.name} have now?"
        answer = str(problem.result)
        prompt = f"Problem: {' '.join(problem.sentences)} {question}\nSolution:"
        return Example(prompt, f" {chain} The answer is {answer}", answer), chain

    def parse(self, output: str) -> str | None:
        """The number after the last "the answer is"."""
        found: list[str] = re.findall(r"the answer is:? (-?\d+)", output, re.IGNORECASE)
        return found[-1] if found else None
