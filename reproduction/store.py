"""The results of runs, a line each, in a file that only grows; any number of processes may add to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from milora.methods import METHODS
from milora.records import append_record, drop_half_line, read_records
from milora_core.errors import MiLoraError
from reproduction.budgets import SIZES
from reproduction.settings import training_defaults

FILE = "results.jsonl"
WORKING_FOLDER = ".working"
"""Beside the results: locks, adapters and checkpoints of unfinished runs."""

FORMAT = 2
"""1: settings without the fields at their defaults, fingerprints of 64 rows. 2: all settings, all rows."""

FINISHED, FAILED = "finished", "failed"
SPEED_ONLY = (
    *("dataloader_num_workers", "disable_tqdm", "eval_on_start", "logging_steps", "logging_strategy", "report_to"),
    *("per_device_eval_batch_size", "use_cpu"),
)
"""Fields of training that decide how fast a run is or what it prints; records agree without them."""

Record = dict[str, Any]


class Store:
    """The results in a folder.

    Raises:
        MiLoraError: If the folder is a file.
    """

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise MiLoraError(f"{folder} is a file; give a folder.")
        self.folder = folder
        self.path = folder / FILE
        self.working = folder / WORKING_FOLDER

    def prepare(self) -> None:
        """Makes the folders; git ignores the working folder.

        Raises:
            MiLoraError: If they cannot be made.
        """
        try:
            (self.working / "locks").mkdir(parents=True, exist_ok=True)
            (self.working / ".gitignore").write_text("*\n", encoding="utf-8")
        except OSError as error:
            raise MiLoraError(f"{self.working} cannot be written to: {error.strerror}.") from error

    def lock(self, name: str) -> FileLock:
        """A lock between processes. The system releases it when the process dies."""
        return FileLock(self.working / "locks" / f"{name}.lock")

    def run_folder(self, digest: str) -> Path:
        """Where a run keeps its adapter and checkpoints while it works."""
        return self.working / "runs" / digest

    def read(self) -> list[Record]:
        """All records, oldest first. Half a line at the end, left by a full disk, is skipped."""
        return [record for _, record in read_records(self.path)] if self.path.exists() else []

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a record as one line.

        Raises:
            MiLoraError: If it cannot be written; earlier records are kept.
        """
        # Locked: only one process at a time may cut off half a line.
        with self.lock("results"):
            try:
                drop_half_line(self.path)
                append_record(self.path, record)
            except OSError as error:
                raise MiLoraError(
                    f"{self.path} cannot be written to: {error.strerror}. The results in it are kept; make room and "
                    "give the same command again."
                ) from error


def key_of(run: Mapping[str, Any]) -> str:
    """Equal for runs that are the same by what they say, whatever their digests and fingerprints are.

    That is the backbone's name, the method with all fields of its configuration, the tasks, the seed, and how it was
    trained and tested. Fields that are left out count as their defaults.
    """
    training = {
        name: value
        for name, value in run["training"].items()
        if name not in SPEED_ONLY and training_defaults().get(name, ...) != value
    }
    data = {name: value for name, value in run["data"].items() if value is not None}
    tested = [run["evaluation"].get(name) for name in ("test_rows", "beams")]
    settings = full_settings(run["method"], run["settings"])
    said = [backbone_name(run["backbone"]), run["method"], settings, run["tasks"], run["seed"], training, data, tested]
    return canonical(said)


def backbone_name(backbone: str) -> str:
    """The last part of a folder or a hub id: copies of a model have one name."""
    return Path(backbone).name


def canonical(value: Any) -> str:
    """One text for equal settings, whatever the order of their keys."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=list)


def full_settings(method: str, settings: Mapping[str, Any]) -> Record:
    """All fields of a method's configuration, those at their defaults included, as JSON has them."""
    return dict(_full_settings(method, canonical(settings)))


@cache
def _full_settings(method: str, settings: str) -> Record:
    config = METHODS[method].config_class
    size = {SIZES[method].field: SIZES[method].paper} if method in SIZES else {}
    needed = {"total_step": 1000} if method == "adalora" else {}
    made = vars(config(**{**needed, **size, **json.loads(settings)}))
    return {one.name: made[one.name] for one in fields(config) if one.init and _is_plain(made[one.name])}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | tuple)
