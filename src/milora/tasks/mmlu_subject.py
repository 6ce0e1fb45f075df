"""Classifies MMLU questions by subject: a task with 57 labels that a small language model can learn.

The task is specific to MiLoRA and built from MMLU's test questions, so there are no published figures for it.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import ClassVar

from milora.tasks.answers import Labels
from milora.tasks.bundled.base import split_of
from milora.tasks.label import labelled_example
from milora.tasks.mmlu import LETTERS, read_questions
from milora.tasks.public import PublicTask
from milora.tasks.task import Example, Split
from milora_core.errors import DataError

SUBJECTS = (
    "abstract algebra", "anatomy", "astronomy", "business ethics", "clinical knowledge", "college biology",
    "college chemistry", "college computer science", "college mathematics", "college medicine", "college physics",
    "computer security", "conceptual physics", "econometrics", "electrical engineering", "elementary mathematics",
    "formal logic", "global facts", "high school biology", "high school chemistry", "high school computer science",
    "high school european history", "high school geography", "high school government and politics",
    "high school macroeconomics", "high school mathematics", "high school microeconomics", "high school physics",
    "high school psychology", "high school statistics", "high school us history", "high school world history",
    "human aging", "human sexuality", "international law", "jurisprudence", "logical fallacies", "machine learning",
    "management", "marketing", "medical genetics", "miscellaneous", "moral disputes", "moral scenarios", "nutrition",
    "philosophy", "prehistory", "professional accounting", "professional law", "professional medicine",
    "professional psychology", "public relations", "security studies", "sociology", "us foreign policy", "virology",
    "world religions",
)  # fmt: skip


class MmluSubject(PublicTask):
    """A question with its choices as the prompt, its subject as the label. An example's `group` is also the subject.

    A hash of the question's text determines its split: 80 % train, 10 % dev, 10 % test, the same on every machine.
    Equal questions with different choices are in the same split.
    """

    name = "mmlu-subject"
    max_new_tokens = 48
    labels: ClassVar[tuple[str, ...]] = SUBJECTS

    def __init__(self, data_dir: str | os.PathLike[str] | None = None):
        super().__init__(data_dir)
        self._labels = Labels(self.labels)

    def load(self, split: Split) -> list[Example]:
        """All rows of a split, subject by subject."""
        examples = []
        for question in read_questions(self.data_dir, "test"):
            if question.subject not in self.labels:
                raise DataError(f"MMLU has no subject {question.subject!r}; its subjects: {', '.join(SUBJECTS)}")
            if split_of(question.text.strip()) == split:
                choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, question.choices, strict=True))
                instruction = f"Please name the subject of the question: {question.text.strip()}\n\n{choices}"
                examples.append(replace(labelled_example(instruction, question.subject), group=question.subject))
        return examples

    def parse(self, output: str) -> str | None:
        """The subject that a text names, or `None`; see [`milora.tasks.answers.Labels.find`]."""
        return self._labels.find(output)
