"""Benchmarks with LLM-Adapters' instructions (Hu et al. 2023), from its files, the original files or the hub."""

from __future__ import annotations

import abc
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from milora.tasks.fields import check_fields
from milora.tasks.files import read_file, read_values
from milora.tasks.hub import load_split
from milora.tasks.public import PublicTask, hold_out
from milora.tasks.rows import Row
from milora.tasks.task import Example, Split
from milora_core.errors import DataError


class InstructionTask(PublicTask):
    """A benchmark with LLM-Adapters' prompts. A question has the same prompt from every source.

    With a `data_dir`, a split is read from `{data_dir}/{folder}/{split}.original.jsonl`, in the hub's schema, else from
    LLM-Adapters' `{split}.json`. Without a `data_dir`, it comes from the dataset on the hub.

    If the source has a `dev` split, it is used. LLM-Adapters' files and some datasets have none: a tenth of `train`, at
    most 500 rows, is then held out as `dev`, and `train` is the rest. The held-out rows do not depend on the `seed` of
    `examples`. Equal prompts are in the same split.
    """

    folder: ClassVar[str]
    hub_id: ClassVar[str]
    hub_config: ClassVar[str | None] = None
    hub_splits: ClassVar[Mapping[str, str]]
    """Maps the task's splits to their names on the hub."""
    hub_columns: ClassVar[Mapping[str, type]]
    """The fields to read from the hub's schema, with their types."""

    def __init__(self, data_dir: str | os.PathLike[str] | None = None):
        super().__init__(data_dir)
        self._sources: dict[str, list[Example]] = {}

    @staticmethod
    @abc.abstractmethod
    def from_hub_row(row: Mapping[str, Any]) -> Example:
        """Converts a row of the hub's dataset, which has every field of `hub_columns`, to an example.

        Raises:
            DataError: the gold answer is not valid for the task.
        """

    @abc.abstractmethod
    def from_file_row(self, prompt: str, completion: str, answer: str | None) -> Example:
        """Converts a row of LLM-Adapters' files to an example: its instruction in the template, `output` and `answer`.

        Raises:
            DataError: the gold answer is not valid for the task.
        """

    def load(self, split: Split) -> list[Example]:
        """All rows of a split, in the source's order."""
        if split == "test" or self._has_dev():
            return self._load(split)
        train, dev = hold_out(self._load("train"))
        return dev if split == "dev" else train

    def _has_dev(self) -> bool:
        return "dev" in self.hub_splits if self.data_dir is None else any(map(Path.is_file, self._files("dev")))

    def _load(self, split: str) -> list[Example]:
        """The rows of a split of the source, cached because `train` and a held-out `dev` share them."""
        if split not in self._sources:
            self._sources[split] = self._from_hub(split) if self.data_dir is None else self._from_folder(split)
        return self._sources[split]

    def _files(self, split: str) -> list[Path]:
        """The possible files of a split in the folder. The first existing one is read."""
        assert self.data_dir is not None
        return [self.data_dir / self.folder / f"{split}.{end}" for end in ("original.jsonl", "json")]

    def _from_folder(self, split: str) -> list[Example]:
        files = self._files(split)
        path = next(filter(Path.is_file, files), None)
        if path is None:
            wanted = " and ".join(f"{self.folder}/{name}.json" for name in self.splits if name != "dev")
            raise DataError(
                f"{files[-1]}: no such file; the data folder must hold {wanted} as LLM-Adapters has them; "
                f"without a data folder, {self.name} comes from the hub ({self.hub_id})"
            )
        if path.suffix == ".jsonl":
            return [self._from_record(record, where) for where, record in read_values(path)]
        return [self._from_row(row, where) for where, row in self.read_rows(path)]

    def read_rows(self, path: Path) -> Iterator[tuple[str, Row]]:
        """The rows of one of LLM-Adapters' files, each with its location.

        Raises:
            DataError: the file cannot be read, or a row lacks its prompt or its completion.
        """
        return ((f"{path}, row {place}", row) for place, row in enumerate(read_file(path), start=1))

    def _from_row(self, row: Row, where: str) -> Example:
        if not isinstance(row.prompt, str) or not isinstance(row.completion, str):
            raise DataError(f"{where}: {self.name} has rows of text, this one is of messages")
        try:
            return self.from_file_row(row.prompt, row.completion, row.answer)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error

    def _from_hub(self, split: str) -> list[Example]:
        dataset = load_split(self.hub_id, self.hub_splits[split], self.hub_config)
        if missing := set(self.hub_columns).difference(dataset.column_names):
            raise DataError(
                f"{self.hub_id} lacks the columns {', '.join(sorted(missing))}; "
                f"columns found: {', '.join(dataset.column_names)}"
            )
        source = f"{self.hub_id} ({self.hub_splits[split]})"
        return [self._from_record(row, f"{source}, row {number}") for number, row in enumerate(dataset, start=1)]

    def _from_record(self, record: object, where: str) -> Example:
        fields = check_fields(record, self.hub_columns, where)
        try:
            return self.from_hub_row(fields)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
