"""From what a user passes as data (a task's name, a file, a folder, a hub id) to rows, and on to TRL's columns."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value

from milora.errors import DataError, did_you_mean
from milora.tasks import registry
from milora.tasks.files import FILE_SUFFIXES, read_file
from milora.tasks.hub import load_split
from milora.tasks.rows import Row, read_records
from milora.tasks.task import check_split

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def read_rows(
    source: str | os.PathLike[str],
    split: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    config: str | None = None,
) -> list[Row]:
    """The rows of a source, which is looked up in this order.

    1. A task's name (`milora.tasks.registry.names()`): `split` is `train` (the default), `dev` or `test`; `data_dir` is
       handed to the task. A folder of the same name is `./name`.
    2. A file: `.jsonl` (a row a line) or `.json` (an array). It is its own split: `split` is not looked at.
    3. A folder: its file `{split}.jsonl` or `{split}.json` (`train` by default), else that split of the dataset in it.
    4. A hub id, `owner/name`: the dataset's `split` (`train` by default) of the configuration `config`.

    See `milora.tasks.rows` for the shapes of rows.

    Raises:
        DataError: there is no such source or split, or it holds something that is not a row; for a file the message
            gives the line (JSON lines) or the row (JSON array), counted from 1.
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
        return read_file(files[0]) if files else _read_dataset(str(path), split, config)
    if path.exists():
        return read_file(path)
    if _HUB_ID.fullmatch(name) and path.suffix.lower() not in FILE_SUFFIXES:
        return _read_dataset(name, split, config)
    raise DataError(_not_found(name, path))


def to_dataset(rows: Sequence[Row]) -> Dataset:
    """Rows as TRL's `SFTTrainer` takes them: the columns `prompt` and `completion`, and `answer` (null where none).

    Strings make TRL's standard type, lists of messages its conversational type. In both the trainer computes the loss
    on the completion alone, so that the prompt is what the router sees.

    Raises:
        DataError: no rows, or strings and messages mixed.
    """
    if not rows:
        raise DataError("there are no rows to make a dataset of")
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


def _read_dataset(name: str, split: str, config: str | None) -> list[Row]:
    dataset = load_split(name, split, config)
    source = f"{name} ({split})"
    return read_records(((f"{source}, row {number}", row) for number, row in enumerate(dataset, start=1)), source)


def _not_found(name: str, path: Path) -> str:
    if not path.parent.is_dir():
        return f"{name}: no such file, and no folder {path.parent}"
    known = [entry.name for entry in path.parent.iterdir()]
    if path.name == name:  # a bare name may be meant as a task's
        known += registry.names()
        kinds = f"file, folder or task (tasks: {', '.join(registry.names())}; a hub dataset is owner/name)"
        return f"{name}: no such {kinds}{did_you_mean(name, known)}"
    return f"{name}: no such file or folder{did_you_mean(path.name, known)}"
