"""AQuA (Ling et al. 2017): algebraic word problems with five choices, answered by a letter after a rationale."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from milora.tasks.answers import find_letter
from milora.tasks.reasoning import ReasoningTask
from milora.tasks.rows import instruction_prompt
from milora.tasks.task import Example
from milora_core.errors import DataError

LETTERS = "ABCDE"


class Aqua(ReasoningTask):
    """AQuA with LLM-Adapters' prompts. The answer is a letter, `A` to `E`.

    The rationales for training come from the data set. People wrote them, and their length and quality vary. The last
    sentence of a completion has the gold letter. In a folder, `{split}.original.jsonl` are the original files (`train`,
    `dev`, `test`) and `{split}.json` are LLM-Adapters' files.
    """

    name = "aqua"
    folder = "AQuA"
    hub_id = "deepmind/aqua_rat"
    hub_config = "raw"
    hub_splits = {"train": "train", "dev": "validation", "test": "test"}  # noqa: RUF012
    hub_columns = {"question": str, "options": list, "rationale": str, "correct": str}  # noqa: RUF012
    answer_kind = f"a letter, {LETTERS[0]} to {LETTERS[-1]}"

    @classmethod
    def from_hub_row(cls, row: Mapping[str, Any]) -> Example:
        """The example for a row of `question`, `options` (`A)21` and so on), `rationale` and `correct` (a letter).

        Raises:
            DataError: the options are not lettered in order, or `correct` is not the letter of an option.
        """
        options: list[str] = row["options"]
        keys = [option[:1] for option in options]
        if keys != list(LETTERS[: len(keys)]) or not all(option[1:2] == ")" for option in options):
            raise DataError(
                f"the question {row['question']!r}: its `options` must be A)..., B)... and so on: {options}"
            )
        if row["correct"] not in keys:
            raise DataError(
                f"the question {row['question']!r}: its `correct` is {row['correct']!r}, none of {', '.join(keys)}"
            )
        # LLM-Adapters took the questions from the code of Kojima et al. (2022), which puts spaces around brackets.
        choices = "".join(f"({option}" for option in options).replace("(", " (").replace(")", ") ")
        prompt = instruction_prompt(f"{row['question'].strip()} Answer Choices:{choices}")
        return cls.reasoned_example(prompt, row["rationale"], row["correct"])

    @classmethod
    def sentence(cls, answer: str) -> str:
        """`The answer is (C).`"""
        return f"The answer is ({answer})."

    def gold(self, answer: str | None) -> str | None:
        """The letter."""
        return answer if answer is not None and re.fullmatch(f"[{LETTERS}]", answer) else None

    def parse(self, output: str) -> str | None:
        """The letter that a text gives, or `None`; see [`milora.tasks.answers.find_letter`]."""
        return find_letter(output, LETTERS)
