"""The results of runs, one line each, in an append-only file. Any number of processes may append to it."""

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
from milora_core.files import writing
from reproduction.budgets import SIZES
from reproduction.settings import training_defaults

FILE = "results.jsonl"
WORKING_FOLDER = ".working"
"""Folder beside the results with locks, adapters and checkpoints of unfinished runs."""

FORMAT = 2
"""1: settings without the fields at their defaults, fingerprints of 64 rows. 2: all settings, all rows."""

FINISHED, FAILED = "finished", "failed"
SPEED_ONLY = (
    *("dataloader_num_workers", "disable_tqdm", "eval_on_start", "logging_steps", "logging_strategy", "report_to"),
    *("per_device_eval_batch_size", "use_cpu"),
)
"""Fields of training that affect only a run's speed or output. They are not part of a run's key."""

Record = dict[str, Any]


class Store:
    """The results in a folder, which must not be a file."""

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise MiLoraError(f"{folder} is a file; give a folder.")
        self.folder = folder
        self.path = folder / FILE
        self.working = folder / WORKING_FOLDER

    def prepare(self) -> None:
        """Creates the folders. Git ignores the working folder."""
        with writing(self.working):
            (self.working / "locks").mkdir(parents=True, exist_ok=True)
            (self.working / ".gitignore").write_text("*\n", encoding="utf-8")

    def lock(self, name: str) -> FileLock:
        """A lock between processes. The system releases it when the process dies."""
        return FileLock(self.working / "locks" / f"{name}.lock")

    def run_folder(self, digest: str) -> Path:
        """The folder of a running run's adapter and checkpoints."""
        return self.working / "runs" / digest

    def read(self) -> list[Record]:
        """All records, oldest first. An incomplete last line, left by a full disk, is skipped."""
        return [record for _, record in read_records(self.path)] if self.path.exists() else []

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a record as one line. Earlier records are kept if it cannot be written."""
        # Locked, because only one process at a time may remove an incomplete line.
        with self.lock("results"), writing(self.path, ". The results in it are kept; give the same command again."):
            drop_half_line(self.path)
            append_record(self.path, record)


def key_of(run: Mapping[str, Any]) -> str:
    """The key of a run. It does not depend on digests and fingerprints.

    It includes the backbone's name, the method with all fields of its configuration, the tasks, the seed, and the
    settings of training and tests. Missing fields count as their defaults.
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
    """The last part of a folder or a hub id, so copies of a model have the same name."""
    return Path(backbone).name


def canonical(value: Any) -> str:
    """The settings as text that does not depend on the order of keys."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=list)


def full_settings(method: str, settings: Mapping[str, Any]) -> Record:
    """All fields of a method's configuration, including defaults, as JSON values."""
    return dict(_full_settings(method, canonical(settings)))


@cache
def _full_settings(method: str, settings: str) -> Record:
    config = METHODS[method].config_class
    size = {SIZES[method].field: SIZES[method].paper} if method in SIZES else {}
    needed = {"total_step": 1000} if method == "adalora" else {}
    given = json.loads(settings)
    if method == "moelora" and given.get("load_balancing_coef") == 0:
        del given["load_balancing_coef"]  # older records state the default of this field, which no longer exists
    made = vars(config(**{**needed, **size, **given}))
    plain = (bool, int, float, str, list, tuple, type(None))
    return {one.name: made[one.name] for one in fields(config) if one.init and isinstance(made[one.name], plain)}
