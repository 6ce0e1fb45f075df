"""Tasks whose answer is one of a few labels, as LLM-Adapters (Hu et al. 2023) words them."""

from __future__ import annotations

import abc
import os
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from milora.errors import DataError, MiLoraError
from milora.tasks.files import read_file
from milora.tasks.hub import load_split
from milora.tasks.rows import instruction_prompt
from milora.tasks.task import SPLITS, Example, Split, Task

_CUE = re.compile(r"\banswer ?(?:is\b|:)")
_DEV_SHARE = 10  # one row in ten,
_DEV_MOST = 500  # at most


class LabelTask(Task):
    """A task of labels, read from LLM-Adapters' files or from the hub; both give the same prompts.

    With a `data_dir`, the rows are those of `{data_dir}/{folder}/train.json` and `test.json`; without, those of the
    dataset on the hub, worded as LLM-Adapters words them.

    `dev` is the hub's own split where there is one. LLM-Adapters' files have none, nor has every dataset: there a tenth
    of `train`, at most 500 rows, is held out, always the same rows whatever the `seed` given to `examples`, and `train`
    is what remains. Equal prompts stay on one side.
    """

    folder: ClassVar[str]
    labels: ClassVar[tuple[str, ...]]
    hub_id: ClassVar[str]
    hub_config: ClassVar[str | None] = None
    hub_splits: ClassVar[Mapping[str, str]]
    """The task's splits, by the names that they have on the hub."""
    hub_columns: ClassVar[frozenset[str]]

    max_new_tokens = 32

    def __init__(self, data_dir: str | os.PathLike[str] | None = None):
        self.data_dir = None if data_dir is None else Path(data_dir)
        self._label = _label_pattern(self.labels)
        self._loaded: dict[str, list[Example]] = {}

    @staticmethod
    @abc.abstractmethod
    def from_hub_row(row: Mapping[str, Any]) -> Example:
        """The example that a row of the hub's dataset is.

        Raises:
            DataError: its gold answer is none of its choices.
        """

    def examples(self, split: Split, count: int | None = None, seed: int = 0) -> Sequence[Example]:
        """The first `count` rows of a split (all that there are with `None`), shuffled by `seed`.

        Raises:
            MiLoraError: there is no such split, or `count` is negative.
            DataError: the rows cannot be found or read, or one has an answer that is none of the labels.
        """
        split = check_split(self.name, split)
        if count is not None and count < 0:
            raise MiLoraError(f"count is {count}, it must be 0 or more, or None for all rows")
        rows = list(self._split(split))
        random.Random(f"{self.name} {split} {seed}").shuffle(rows)
        return rows[:count]

    def parse(self, output: str) -> str | None:
        """The label that a text gives, or `None`.

        It is the first label after "answer is" (or "answer:"). Where nothing follows such words, it is the only label
        in the text; several different ones are no answer. Neither is a label after "not", nor one in a list such as
        "true/false". Case, punctuation and a space in the label ("Answer 2") do not matter.
        """
        text = re.sub(r"\s*/\s*", "/", " ".join(output.casefold().split()))
        cue = _CUE.search(text)
        match = self._label.search(text, cue.end()) if cue else None
        found = {_normalised(m[0]) for m in ([match] if match else self._label.finditer(text))}
        return found.pop() if len(found) == 1 else None

    def _split(self, split: Split) -> list[Example]:
        has_own_dev = self.data_dir is None and "dev" in self.hub_splits
        if split == "test" or has_own_dev:
            return self._load(split)
        train, dev = hold_out(self._load("train"))
        return dev if split == "dev" else train

    def _load(self, split: str) -> list[Example]:
        if split not in self._loaded:
            if self.data_dir is None:
                self._loaded[split] = self._from_hub(split)
            else:
                self._loaded[split] = self._from_file(self.data_dir / self.folder / f"{split}.json")
        return self._loaded[split]

    def _from_file(self, path: Path) -> list[Example]:
        if not path.is_file():
            raise DataError(
                f"{path}: no such file; the data folder must hold {self.folder}/train.json and {self.folder}/test.json "
                f"as LLM-Adapters has them; without a data folder, {self.name} comes from the hub ({self.hub_id})"
            )
        examples = []
        for number, row in enumerate(read_file(path), start=1):
            if not isinstance(row.prompt, str) or not isinstance(row.completion, str):
                raise DataError(f"{path}, row {number}: {self.name} has rows of text, this one is of messages")
            if row.answer not in self.labels:
                raise DataError(
                    f"{path}, row {number}: the answer is {row.answer!r}, it must be one of {', '.join(self.labels)}"
                )
            examples.append(Example(row.prompt, row.completion, row.answer))
        return examples

    def _from_hub(self, split: str) -> list[Example]:
        dataset = load_split(self.hub_id, self.hub_splits[split], self.hub_config)
        if missing := self.hub_columns.difference(dataset.column_names):
            raise DataError(
                f"{self.hub_id} lacks the columns {', '.join(sorted(missing))}; "
                f"columns found: {', '.join(dataset.column_names)}"
            )
        return [self.from_hub_row(row) for row in dataset]


def check_split(task: str, split: str) -> Split:
    """The split, if it is one that tasks have.

    Raises:
        MiLoraError: it is none.
    """
    if split not in SPLITS:
        raise MiLoraError(f"{task} has no split {split!r}; its splits: {', '.join(SPLITS)}")
    return cast(Split, split)


def labelled_example(instruction: str, answer: str) -> Example:
    """An example in LLM-Adapters' words: its prompt template, and "the correct answer is ..." to complete it."""
    return Example(instruction_prompt(instruction), f"the correct answer is {answer}", answer)


def hold_out(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """What remains to train on, and a dev set: a tenth of the prompts, at most 500 and at least one.

    The choice depends on nothing but the prompts themselves, so that two runs with different seeds, or files in another
    order, never train on each other's dev rows.
    """
    prompts = sorted({example.prompt for example in examples})
    count = min(_DEV_MOST, max(1, len(prompts) // _DEV_SHARE))
    held = set(random.Random(0).sample(prompts, count))
    train = [example for example in examples if example.prompt not in held]
    return train, [example for example in examples if example.prompt in held]


def _label_pattern(labels: Sequence[str]) -> re.Pattern[str]:
    # "answer2" is also written "answer 2" or "answer-2".
    forms = "|".join(re.sub(r"(?<=[a-z])(?=\d)", "[ _-]?", label) for label in labels)
    return re.compile(rf"(?<![\w/])(?<!not )(?<!n't )(?<!n\u2019t )(?:{forms})(?![\w/])")


def _normalised(label: str) -> str:
    return re.sub(r"[ _-]", "", label)
