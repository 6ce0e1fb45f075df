"""GSM8K (Cobbe et al. 2021): grade-school math word problems, answered by a number after a chain of thought."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from milora.tasks.numbers import find_number, number
from milora.tasks.reasoning import ReasoningTask
from milora.tasks.rows import instruction_prompt
from milora.tasks.task import Example
from milora_core.errors import DataError

_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
_GOLD = "####"


class Gsm8k(ReasoningTask):
    """GSM8K with LLM-Adapters' template. An output is correct if its number equals the gold number in value.

    The chains of thought are the original ones, written by people, without the calculator marks (`<<48/2=24>>`). In a
    folder, `train.original.jsonl` and `test.original.jsonl` are the original files and `test.json` is LLM-Adapters'
    file. The original has no dev split, so a part of train is held out.
    """

    name = "gsm8k"
    folder = "gsm8k"
    hub_id = "openai/gsm8k"
    hub_config = "main"
    hub_splits = {"train": "train", "test": "test"}  # noqa: RUF012
    hub_columns = {"question": str, "answer": str}  # noqa: RUF012
    answer_kind = "a number"

    @classmethod
    def from_hub_row(cls, row: Mapping[str, Any]) -> Example:
        """The example for a row of `question` and `answer` (a chain of thought that ends in `#### N`).

        Raises:
            DataError: `answer` does not end in `#### N`.
        """
        chain, mark, gold = row["answer"].rpartition(_GOLD)
        answer = number(gold)
        if not mark or answer is None:
            raise DataError(f"the question {row['question']!r}: its answer does not end in `{_GOLD}` and a number")
        return cls.reasoned_example(instruction_prompt(row["question"]), _CALCULATOR.sub("", chain), answer)

    @classmethod
    def sentence(cls, answer: str) -> str:
        """`The answer is 18.`"""
        return f"The answer is {answer}."

    def gold(self, answer: str | None) -> str | None:
        """The number in canonical form."""
        return None if answer is None else number(answer)

    def parse(self, output: str) -> str | None:
        """The number that a text gives, or `None`; see [`milora.tasks.numbers.find_number`]."""
        return find_number(output)
