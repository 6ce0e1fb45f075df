"""The interface of tasks: rows to train and test on, and grading of a model's outputs."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

from milora_core.errors import MiLoraError

Split = Literal["train", "dev", "test"]
SPLITS: tuple[str, ...] = get_args(Split)


@dataclass(frozen=True)
class Example:
    """One row of a task.

    The model reads `prompt` and is trained to generate `completion` (prompt + completion is the whole text; the trainer
    appends the end-of-sequence token). [`Task.is_correct`] compares an output with the gold `answer`. `group` is the
    row's part of the benchmark (a subject of MMLU, a task of BBH), or `None` if the benchmark has no parts.
    """

    prompt: str
    completion: str
    answer: str
    group: str | None = None


class Task(abc.ABC):
    """A benchmark: the source of its rows, the parser of outputs and the rule for a correct answer."""

    name: str
    max_new_tokens: int
    """The limit of a generation, long enough for every gold completion of the task."""

    splits: ClassVar[tuple[str, ...]] = SPLITS
    """The splits that the task has."""

    average: ClassVar[Literal["rows", "groups"]] = "rows"
    """How the benchmark's accuracy is averaged: over all rows, or over the accuracies of its groups."""

    differs: ClassVar[str] = ""
    """How the task differs from the MiLoRA paper's, in one or two sentences; empty if no difference is known."""

    @abc.abstractmethod
    def examples(self, split: Split, count: int | None = None, seed: int = 0) -> Sequence[Example]:
        """The first `count` rows of a split (all rows with `None`), in an order that `seed` determines."""

    @abc.abstractmethod
    def parse(self, output: str) -> str | None:
        """The answer in a generated text, normalised like `Example.answer`, or `None` if the text has none."""

    def is_correct(self, output: str, answer: str) -> bool:
        """Whether a generated text has the gold answer. An output that cannot be parsed is wrong."""
        return self.parse(output) == answer


def check_split(task: str, split: str, splits: Sequence[str] = SPLITS) -> Split:
    """The split, after a check that the task has it.

    Raises:
        MiLoraError: the task has no such split.
    """
    if split not in splits:
        raise MiLoraError(f"{task} has no split {split!r}; its splits: {', '.join(splits)}")
    return cast(Split, split)
