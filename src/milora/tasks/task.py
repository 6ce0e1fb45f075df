"""What every task offers: rows for training, and a judgement of what a model answered."""

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

    `prompt` is all that the model reads, `completion` what it is trained to write after it (prompt + completion is the
    whole text; the end-of-sequence token is appended by the trainer), `answer` the gold answer that
    [`Task.is_correct`] compares with. `group` is the part of the benchmark that the row belongs to (a subject of MMLU,
    a task of BBH), where it has parts.
    """

    prompt: str
    completion: str
    answer: str
    group: str | None = None


class Task(abc.ABC):
    """A benchmark: where its rows come from, how an output is read, and what counts as right."""

    name: str
    max_new_tokens: int
    """Enough for every gold completion of the task."""

    splits: ClassVar[tuple[str, ...]] = SPLITS
    """The splits that the task has."""

    average: ClassVar[Literal["rows", "groups"]] = "rows"
    """What the benchmark's one figure is the mean over: all rows, or the accuracies of its groups."""

    differs: ClassVar[str] = ""
    """How it differs from the task of the MiLoRA paper, in a sentence or two; empty where it is not known to."""

    @abc.abstractmethod
    def examples(self, split: Split, count: int | None = None, seed: int = 0) -> Sequence[Example]:
        """The first `count` rows of a split (all of them with `None`), in an order fixed by `seed`."""

    @abc.abstractmethod
    def parse(self, output: str) -> str | None:
        """The answer that a generated text gives, normalised as `Example.answer` is, or `None` if it gives none."""

    def is_correct(self, output: str, answer: str) -> bool:
        """Whether a generated text gives the gold answer; an output that cannot be parsed is wrong."""
        return self.parse(output) == answer


def check_split(task: str, split: str, splits: Sequence[str] = SPLITS) -> Split:
    """The split, if it is one that the task has.

    Raises:
        MiLoraError: it is none.
    """
    if split not in splits:
        raise MiLoraError(f"{task} has no split {split!r}; its splits: {', '.join(splits)}")
    return cast(Split, split)
