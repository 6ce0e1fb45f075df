"""Arithmetic problems answered with a chain of thought, with the prompts of LLM-Adapters (Hu et al. 2023)."""

from __future__ import annotations

import abc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from milora.tasks.fields import check_fields
from milora.tasks.files import read_values
from milora.tasks.instruction import InstructionTask
from milora.tasks.rows import Row, instruction_prompt
from milora.tasks.task import Example
from milora_core.errors import DataError

_FINAL_SENTENCE = re.compile(r"\s*(?:Therefore, |So, |So )?the (?:final )?answer is[^\n]*\Z", re.IGNORECASE)
_HEADING = re.compile(r"\A(?:[^\n]{0,80}\n)?\s*(?:A|Answer|Rationale):\s*")


class ReasoningTask(InstructionTask):
    """A task whose completion is a chain of thought followed by the sentence "The answer is ...".

    A model wrote the `output` of LLM-Adapters' files, and its answer does not always equal the row's `answer`. If it
    differs or is missing, the output is not used and the completion is the last sentence only.
    """

    answer_kind: ClassVar[str]
    """A description of valid answers, for error messages."""

    max_new_tokens = 512

    @classmethod
    @abc.abstractmethod
    def sentence(cls, answer: str) -> str:
        """The last sentence of a completion, which gives the answer."""

    @abc.abstractmethod
    def gold(self, answer: str | None) -> str | None:
        """An `answer` field normalised for `Example.answer`, or `None` if it is not valid for the task."""

    def read_rows(self, path: Path) -> Iterator[tuple[str, Row]]:
        """The rows of a file. An `output` may be empty, as the model that wrote the outputs failed on some rows."""
        for where, record in read_values(path):
            row = check_fields(record, {"instruction": str, "output": str, "answer": str}, where)
            if not row["instruction"].strip():
                raise DataError(f"{where}: `instruction` is empty")
            yield (
                where,
                Row(instruction_prompt(row["instruction"], row.get("input") or ""), row["output"], row["answer"]),
            )

    def from_file_row(self, prompt: str, completion: str, answer: str | None) -> Example:
        """The row as an example, with its chain of thought if that ends in the gold answer.

        Raises:
            DataError: the answer is not valid for the task.
        """
        gold = self.gold(answer)
        if gold is None:
            raise DataError(f"the answer is {answer!r}, it must be {self.answer_kind}")
        chain = completion if self.parse(completion) == gold else ""
        return self.reasoned_example(prompt, _FINAL_SENTENCE.sub("", _HEADING.sub("", chain)), gold)

    @classmethod
    def reasoned_example(cls, prompt: str, chain: str, answer: str) -> Example:
        """An example whose completion is a chain of thought (may be empty) and the last sentence."""
        return Example(prompt, f"{chain.strip()}\n{cls.sentence(answer)}".lstrip(), answer)
