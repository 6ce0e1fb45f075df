"""The rows of a training run: reads its sources, mixes them, splits off a dev set and counts rows that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from jinja2 import TemplateError

from milora.tasks.public import hold_out
from milora.tasks.rows import Row, Text
from milora.tasks.sources import dev_split, read_dev_rows, read_rows
from milora.training.arguments import DataArguments
from milora_core.errors import MiLoraError


@dataclass
class SourceCounts:
    """The row counts of a source.

    Attributes:
        train: Rows to train on.
        dev: Rows of the dev set.
        too_long: Rows left out because prompt and completion together do not fit.
        no_room: Rows left out because the prompt alone leaves no space for an answer.
    """

    train: int = 0
    dev: int = 0
    too_long: int = 0
    no_room: int = 0

    def to_dict(self) -> dict[str, int]:
        """For JSON."""
        return asdict(self)


@dataclass
class Mixture:
    """The rows of all sources, one source after the other (the trainer shuffles them again in each epoch, by its seed).

    Attributes:
        train: Rows to train on.
        dev: Rows for dev perplexity and for training on dev batches.
        counts: The counts by source.
        longest: Tokens of the longest row, prompt and completion.
    """

    train: list[Row] = field(default_factory=list)
    dev: list[Row] = field(default_factory=list)
    counts: dict[str, SourceCounts] = field(default_factory=dict)
    longest: int = 0

    @property
    def left_out(self) -> int:
        """Rows that did not fit."""
        return sum(count.too_long + count.no_room for count in self.counts.values())


@dataclass
class SourceRows:
    """The rows of one source, as read."""

    train: Sequence[Row] = ()
    dev: Sequence[Row] = ()


def read_sources(data: DataArguments, seed: int) -> dict[str, SourceRows]:
    """Reads all sources, and holds out dev rows if a source has none.

    A task has its own dev split, and a folder or a dataset may have one. Of other sources a share, at most 500 rows, is
    held out: equal prompts stay on one side, and so do all replies of a chat. With `dev_data` only those rows are the
    dev set, and training uses all others.

    Args:
        data: The sources.
        seed: Decides which rows are held out.

    Raises:
        MiLoraError: If there is no source, or one cannot be read.
    """
    if not data.sources:
        raise MiLoraError("No training data: pass --task with a task's name, or --data with a file.")
    sources: dict[str, SourceRows] = {}
    for name in data.sources:
        rows: Sequence[Row] = read_rows(name, "train", data.data_dir)
        dev: Sequence[Row] = ()
        if not data.dev_data:
            if split := dev_split(name):
                dev = read_rows(name, split, data.data_dir)
            elif data.dev_fraction:
                rows, dev = hold_out(rows, data.dev_fraction, seed, _chat_of(rows))
        sources[name] = SourceRows(rows[: data.train_rows], dev[: data.dev_rows])
    for name in data.dev_data:
        source = sources.setdefault(name, SourceRows())
        source.dev = [*source.dev, *read_dev_rows(name, data.data_dir)[: data.dev_rows]]
    return sources


def mix(sources: Mapping[str, SourceRows], tokenizer: Any, max_length: int | None) -> Mixture:
    """Joins the sources, and leaves out and counts the rows that do not fit. Rows are never truncated.

    Args:
        sources: The sources by name.
        tokenizer: The backbone's tokenizer.
        max_length: Maximum number of tokens per row, including the end of sequence; `None` for no limit.

    Raises:
        MiLoraError: If no training row is left.
    """
    mixture = Mixture()
    for name, source in sources.items():
        counts = mixture.counts[name] = SourceCounts()
        train, longest_train = _fitting(source.train, tokenizer, max_length, counts)
        dev, longest_dev = _fitting(source.dev, tokenizer, max_length, counts)
        counts.train, counts.dev = len(train), len(dev)
        mixture.train += train
        mixture.dev += dev
        mixture.longest = max(mixture.longest, longest_train, longest_dev)
    if not mixture.train:
        no_room = sum(count.no_room for count in mixture.counts.values())
        raise MiLoraError(
            f"None of the training rows fits max_length={max_length} ({mixture.left_out} rows are too long, {no_room} "
            "of them because of the prompt alone): raise --max_length (at most the backbone's positions), or shorten "
            "the rows."
        )
    return mixture


def _chat_of(rows: Sequence[Row]) -> Callable[[Row], str]:
    """A function that identifies the chat of a row: the first prompt that is a prefix of the row's own prompt.

    A reply's prompt is the chat before it, so it begins with the prompt of each earlier reply.
    """
    prompts = {_turns(row.prompt) for row in rows}

    def chat(row: Row) -> str:
        turns = _turns(row.prompt)
        beginnings = (turns[:length] for length in range(1, len(turns) + 1))
        return json.dumps(next(beginning for beginning in beginnings if beginning in prompts))

    return chat


def _turns(prompt: Text) -> tuple[tuple[str, str], ...]:
    """A prompt's messages; a string is one message."""
    if isinstance(prompt, str):
        return (("", prompt),)
    return tuple((message["role"], message["content"]) for message in prompt)


def _fitting(
    rows: Sequence[Row], tokenizer: Any, max_length: int | None, counts: SourceCounts
) -> tuple[list[Row], int]:
    """The rows whose prompt and completion with the end of sequence fit, and the number of tokens of the longest.

    The others are counted.
    """
    fitting = []
    longest = 0
    for row in rows:
        length = _length(row, tokenizer)
        if max_length is None or length <= max_length:
            fitting.append(row)
            longest = max(longest, length)
        elif _prompt_length(row, tokenizer) >= max_length:
            counts.no_room += 1
        else:
            counts.too_long += 1
    return fitting, longest


def _length(row: Row, tokenizer: Any) -> int:
    if isinstance(row.prompt, str) and isinstance(row.completion, str):
        return len(tokenizer(row.prompt + row.completion)["input_ids"]) + 1
    return _chat_length([*row.prompt, *row.completion], tokenizer)


def _prompt_length(row: Row, tokenizer: Any) -> int:
    if isinstance(row.prompt, str):
        return len(tokenizer(row.prompt)["input_ids"])
    return _chat_length(row.prompt, tokenizer, add_generation_prompt=True)


def _chat_length(messages: Sequence[Any], tokenizer: Any, **options: Any) -> int:
    try:
        return len(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])
    except TemplateError as error:
        raise MiLoraError(f"The chat template does not accept the row {str(messages)[:60]}: {error}.") from error
