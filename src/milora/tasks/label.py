"""Tasks whose answer is one of a few labels, with the prompts of LLM-Adapters (Hu et al. 2023)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import ClassVar

from milora.tasks.answers import Labels
from milora.tasks.instruction import InstructionTask
from milora.tasks.rows import instruction_prompt
from milora.tasks.task import Example
from milora_core.errors import DataError


class LabelTask(InstructionTask):
    """A task whose completion is "the correct answer is" and a label."""

    labels: ClassVar[tuple[str, ...]]

    max_new_tokens = 32

    def __init__(self, data_dir: str | os.PathLike[str] | None = None):
        super().__init__(data_dir)
        self._labels = Labels(self.labels)

    def from_file_row(self, prompt: str, completion: str, answer: str | None) -> Example:
        """The row as an example, unchanged.

        Raises:
            DataError: the answer is not one of the labels.
        """
        if answer not in self.labels:
            raise DataError(f"the answer is {answer!r}, it must be one of {', '.join(self.labels)}")
        return Example(prompt, completion, answer)

    def parse(self, output: str) -> str | None:
        """The label that a text gives, or `None`; see [`milora.tasks.answers.Labels.find`]."""
        return self._labels.find(output)


def labelled_example(instruction: str, answer: str) -> Example:
    """An example with LLM-Adapters' prompt template and the completion "the correct answer is ..."."""
    return Example(instruction_prompt(instruction), f"the correct answer is {answer}", answer)


def chosen(question: str, keys: Sequence[str], answer: str) -> int:
    """The index, from 0, of the correct choice.

    Raises:
        DataError: the answer is not the key of a choice.
    """
    if answer not in keys:
        raise DataError(f"the question {question!r}: its answer {answer!r} is none of {', '.join(keys)}")
    return keys.index(answer)
