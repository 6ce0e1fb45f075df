"""Problems of arithmetic that are answered with a chain of thought, as LLM-Adapters (Hu et al. 2023) trains them."""

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
    """A task whose completion is a chain of thought, and at its end the sentence "The answer is ...".

    The `output` of LLM-Adapters' files was written by a model and does not always come to the row's `answer`. One that
    comes to another answer, or to none, is not used: the completion is then the last sentence alone.
    """

    answer_kind: ClassVar[str]
    """What an answer is, in words, for messages."""

    max_new_tokens = 512

    @classmethod
    @abc.abstractmethod
    def sentence(cls, answer: str) -> str:
        """The sentence that gives an answer, at the end of a completion."""

    @abc.abstractmethod
    def gold(self, answer: str | None) -> str | None:
        """An `answer` field as `Example.answer` has it, or `None` if it is none of the task's kind."""

    def read_rows(self, path: Path) -> Iterator[tuple[str, Row]]:
        """The rows of a file; an `output` may be empty here, since the model that wrote them failed at some."""
        for where, record in read_values(path):
            row = check_fields(record, {"instruction": str, "output": str, "answer": str}, where)
            if not row["instruction"].strip():
                raise DataError(f"{where}: `instruction` is empty")
            yield (
                where,
                Row(instruction_prompt(row["instruction"], row.get("input") or ""), row["output"], row["answer"]),
            )

    def from_file_row(self, prompt: str, completion: str, answer: str | None) -> Example:
        """The row, with its chain of thought if that comes to the answer.

        Raises:
            DataError: its answer is none of the task's kind.
        """
        gold = self.gold(answer)
        if gold is None:
            raise DataError(f"the answer is {answer!r}, it must be {self.answer_kind}")
        chain = completion if self.parse(completion) == gold else ""
        return self.reasoned_example(prompt, _FINAL_SENTENCE.sub("", _HEADING.sub("", chain)), gold)

    @classmethod
    def reasoned_example(cls, prompt: str, chain: str, answer: str) -> Example:
        """An example whose completion is a chain of thought (if there is any) and the sentence that ends it."""
        return Example(prompt, f"{chain.strip()}\n{cls.sentence(answer)}".lstrip(), answer)
