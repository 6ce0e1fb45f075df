"""What runs need: a backbone's weights, tasks' rows, a judge. What is at hand, and a fingerprint of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from milora.backbone.loading import locate
from milora.backbone.shapes import SHAPES, shape_config
from milora.evaluation.run import Judging
from milora.tasks import registry
from milora.tasks.mt_bench import MtBench, Question
from milora.tasks.rows import Row
from milora.tasks.sources import read_dev_rows, read_rows
from milora.tasks.task import Example
from milora_core.errors import MiLoraError

ROWS_OF_A_FINGERPRINT = 64
PART = 1 << 20
"""Of a weights' file this much from either end is read for its fingerprint."""

MT_BENCH = MtBench.name
NEEDS_A_JUDGE = "its answers are judged by a model, which --judge-url names"


class Materials:
    """The backbones and tasks of a report; each is looked at once.

    Args:
        data_dir: Folder of the benchmarks' files; without it they come from the hub.
        judging: Who grades the answers to MT-Bench; without a `url` nobody does.
    """

    def __init__(self, data_dir: str | None = None, judging: Judging | None = None) -> None:
        self.data_dir = data_dir
        self.judging = judging or Judging()
        self._backbones: dict[str, _Backbone] = {}
        self._splits: dict[tuple[str, str], _Found] = {}

    def config(self, backbone: str) -> Any:
        """The transformers configuration of a backbone, also of a shape without weights.

        Raises:
            MiLoraError: If there is none.
        """
        return self._backbone(backbone).config

    def backbone_missing(self, backbone: str) -> str | None:
        """Why a backbone cannot be trained, in a line, or `None`."""
        return self._backbone(backbone).missing

    def backbone_fingerprint(self, backbone: str) -> str:
        """Of the files of a backbone that is a folder, wherever that lies; of another its name."""
        return self._backbone(backbone).fingerprint

    def rows_missing(self, task: str, split: str) -> str | None:
        """Why a split of a task cannot be used, in a line, or `None`."""
        return self._rows(task, split).missing

    def rows_fingerprint(self, source: str, split: str) -> str:
        """Of the first rows of a task's split, or of another source (a file, a folder, a hub id) by itself."""
        return self._rows(source, split).fingerprint

    def _backbone(self, name: str) -> _Backbone:
        return self._backbones.setdefault(name, _Backbone(name))

    def _rows(self, source: str, split: str) -> _Found:
        if (source, split) not in self._splits:
            self._splits[source, split] = _look_for_rows(source, split, self.data_dir)
        return self._splits[source, split]


def has_answers(task: str) -> bool:
    """Whether an output can be right or wrong; of instructions to train on none is."""
    return "test" in registry.get(task).splits


class _Found:
    def __init__(self, fingerprint: str = "", missing: str | None = None) -> None:
        self.fingerprint = fingerprint
        self.missing = missing


class _Backbone:
    def __init__(self, name: str) -> None:
        self._name = name

    @cached_property
    def config(self) -> Any:
        if self._name in SHAPES or self._is_folder:
            return shape_config(self._name if self._name in SHAPES else locate(self._name))
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(locate(self._name))
        except (OSError, ValueError) as error:
            raise MiLoraError(f"The backbone {self._name} cannot be loaded: {_first_line(error)}") from error

    @cached_property
    def missing(self) -> str | None:
        if self._name in SHAPES and not self._is_folder:
            return (
                f"{self._name} is a shape without weights: name a folder or a hub id that has them, as --backbone or, "
                "for Table 7, under other_backbones in the settings file"
            )
        try:
            _ = self.config
        except MiLoraError as error:
            return _first_line(error)
        return None

    @cached_property
    def fingerprint(self) -> str:
        if not self._is_folder:
            return self._name
        digest = hashlib.blake2b(digest_size=8)
        folder = Path(locate(self._name))
        for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(PART))
                file.seek(max(path.stat().st_size - PART, 0))
                digest.update(file.read())
        return digest.hexdigest()

    @cached_property
    def _is_folder(self) -> bool:
        try:
            return Path(locate(self._name)).is_dir()
        except MiLoraError:
            return False


def _look_for_rows(source: str, split: Any, data_dir: str | None) -> _Found:
    rows: Sequence[Example | Row | Question]
    try:
        if source == MT_BENCH:
            rows = MtBench(data_dir).questions()
        elif source in registry.names():
            rows = registry.get(source, data_dir).examples(split, ROWS_OF_A_FINGERPRINT, 0)
        else:
            rows = (read_dev_rows(source) if split == "dev" else read_rows(source))[:ROWS_OF_A_FINGERPRINT]
    except (MiLoraError, OSError) as error:
        return _Found(missing=_first_line(error))
    if not rows:
        return _Found(missing=f"{source} has no rows in its split {split}")
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(f"{_contents(row)}\n".encode())
    return _Found(digest.hexdigest())


def _contents(row: Example | Row | Question) -> str:
    if isinstance(row, Question):
        return f"{row.id} {row.category!r} {row.turns!r} {row.references!r}"
    return f"{row.prompt!r} {row.completion!r} {row.answer!r}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
