"""Loads rows from a data source (a task's name, a file, a folder, a hub id) and converts them to TRL's columns."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milora.tasks import registry
from milora.tasks.files import FILE_SUFFIXES, is_stream, read_file
from milora.tasks.hub import full_name, load_split, split_names
from milora.tasks.rows import Row, read_records
from milora.tasks.task import SPLITS, check_split
from milora_core.errors import DataError, did_you_mean, importing

if TYPE_CHECKING:
    from datasets import Dataset

_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::(.+))?")

DEV_SPLITS = ("dev", "validation", "valid", "val")
"""Names of dev splits. The first one that a source has is read."""


def read_rows(
    source: str | os.PathLike[str],
    split: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> list[Row]:
    """The rows of a source. `source` is looked up in this order:

    1. A task's name (`milora.tasks.registry.names()`). `split` is `train` (the default), `dev` or `test`. The task gets
       `data_dir`. Write `./name` for a folder of the same name.
    2. A file: `.jsonl` (one row per line) or `.json` (an array). A file has no splits, so `split` is ignored. Standard
       input (`-`) and pipes such as `/dev/stdin` are read once, as JSON lines.
    3. A folder: its file `{split}.jsonl` or `{split}.json` (`train` by default), else that split of a dataset saved in
       the folder.
    4. A hub id, `owner/name` or `owner/name:configuration`: the dataset's `split` (`train` by default).

    See `milora.tasks.rows` for the formats of rows.

    Raises:
        DataError: there is no such source or split, or a record is not a row. For a file the message gives the line
            (JSON lines) or the row (JSON array), counted from 1.
        MiLoraError: a task has no such split.
    """
    name = os.fspath(source)
    if name in registry.names():
        examples = registry.get(name, data_dir).examples(check_split(name, split or "train"))
        return [Row(example.prompt, example.completion, example.answer) for example in examples]
    path = Path(name).expanduser()
    split = split or "train"
    if path.is_dir():
        files = [file for suffix in FILE_SUFFIXES if (file := path / f"{split}{suffix}").is_file()]
        if len(files) > 1:
            raise DataError(f"{path} has {' and '.join(file.name for file in files)}: name the one to read")
        return read_file(files[0]) if files else _read_dataset(str(path), None, split)
    if path.exists() or is_stream(path):
        return read_file(path)
    return _read_dataset(*_hub_dataset(name), split)


def dev_split(source: str | os.PathLike[str]) -> str | None:
    """The name of a source's dev split: the first of [`DEV_SPLITS`] that it has, or `None`.

    Files, and single datasets saved to disk, have no splits.

    Raises:
        DataError: there is no such source, or it cannot be read.
    """
    name = os.fspath(source)
    return "dev" if name in registry.names() else _first_dev(_splits(name) or ())


def read_dev_rows(source: str | os.PathLike[str], data_dir: str | os.PathLike[str] | None = None) -> list[Row]:
    """The dev rows of a source: its [`dev_split`], or all rows if the source has no splits.

    Raises:
        DataError: as [`read_rows`], or none of the source's splits is a dev split.
        MiLoraError: a task has no dev split.
    """
    name = os.fspath(source)
    if name in registry.names():
        return read_rows(name, "dev", data_dir)
    splits = _splits(name)
    split = _first_dev(splits or ())
    if splits is not None and split is None:
        raise DataError(
            f"{name} has no split {' or '.join(DEV_SPLITS[:2])} to take dev rows from; its splits: "
            f"{', '.join(splits)}: name a file of dev rows, or a source with such a split"
        )
    return read_rows(name, split, data_dir)


def to_dataset(rows: Sequence[Row]) -> Dataset:
    """A dataset for TRL's `SFTTrainer`, with the columns `prompt`, `completion` and `answer` (may be null).

    Strings give TRL's standard type, lists of messages its conversational type. With both, the trainer computes the
    loss on the completion only, and the router sees the prompt.

    Raises:
        DataError: there are no rows, or strings and messages are mixed.
    """
    if not rows:
        raise DataError("there are no rows to make a dataset of")
    with importing("train", "A dataset"):
        from datasets import Dataset, Features, List, Value

    kinds = {type(text) for row in rows for text in (row.prompt, row.completion)}
    if len(kinds) > 1:
        raise DataError("rows of strings and rows of messages cannot share a dataset: keep one kind")
    text = Value("string") if kinds == {str} else List({"role": Value("string"), "content": Value("string")})
    columns: dict[str, list[Any]] = {
        column: [getattr(row, column) for row in rows] for column in ("prompt", "completion", "answer")
    }
    return Dataset.from_dict(
        columns, features=Features({"prompt": text, "completion": text, "answer": Value("string")})
    )


def _splits(name: str) -> list[str] | None:
    """The splits of a source other than a task, or `None` if it has no splits."""
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted({file.stem for file in path.iterdir() if file.suffix in FILE_SUFFIXES and file.is_file()})
        return files if {*SPLITS, *DEV_SPLITS}.intersection(files) else split_names(str(path))
    return None if path.exists() or is_stream(path) else split_names(*_hub_dataset(name))


def _first_dev(splits: Sequence[str]) -> str | None:
    return next((split for split in DEV_SPLITS if split in splits), None)


def _hub_dataset(name: str) -> tuple[str, str | None]:
    """The id and the configuration of a dataset on the hub.

    Raises:
        DataError: the name is not a hub id.
    """
    found = _HUB_ID.fullmatch(name)
    if found is None or Path(found[1]).suffix.lower() in FILE_SUFFIXES:
        raise DataError(_not_found(name, Path(name).expanduser()))
    return found[1], found[2]


def _read_dataset(name: str, config: str | None, split: str) -> list[Row]:
    dataset = load_split(name, split, config)
    source = f"{full_name(name, config)} ({split})"
    return read_records(((f"{source}, row {number}", row) for number, row in enumerate(dataset, start=1)), source)


def _not_found(name: str, path: Path) -> str:
    if not path.parent.is_dir():
        return f"{name}: no such file, and no folder {path.parent}"
    known = [entry.name for entry in path.parent.iterdir()]
    if path.name == name:  # a bare name may be a misspelt task
        known += registry.names()
        tasks = ", ".join(registry.names())
        kinds = f"file, folder or task (tasks: {tasks}; a hub dataset is owner/name or owner/name:configuration)"
        return f"{name}: no such {kinds}{did_you_mean(name, known)}"
    return f"{name}: no such file or folder{did_you_mean(path.name, known)}"
