"""Works through a grid: takes one free run after another until all have finished or failed."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from filelock import Timeout

from milora_core.errors import MiLoraError
from milora_core.files import is_disk_full
from reproduction.adapter_tests import UnfinishedRunError
from reproduction.grid import Grid, Run
from reproduction.inputs import Inputs
from reproduction.run import execute, revision
from reproduction.store import FAILED, FINISHED, Record, Store, key_of

Execute = Callable[[Run, Path, Inputs], Record]

WAIT = 2.0
"""Seconds between checks of runs that other processes are making."""


@dataclass
class Worker:
    """One process that works on a grid: makes runs with `execute` and reports each result as a line to `say`."""

    grid: Grid
    store: Store
    inputs: Inputs
    execute: Execute = execute
    say: Callable[[str], None] = lambda _: None

    def __post_init__(self) -> None:
        # A run that failed before this call is tried again. A run that fails now, in any process, is not.
        self._failures_before = _failures(self.store.read())
        self._failed = 0

    def work(self) -> int:
        """Makes every run without a result, and waits for runs that other processes are making.

        A failed run is recorded with its message and does not stop the others. Returns the number of runs that failed.

        Raises:
            MiLoraError: If a result cannot be written, for example on a full disk. Finished runs are kept.
        """
        self.store.prepare()
        is_told = False
        while left := self._left():
            made = [self._try(run) for run in left]
            if not any(made) and (left := self._left()):
                if not is_told:
                    self.say(f"Waiting for {len(left)} runs that other processes are making.")
                is_told = True
                time.sleep(WAIT)
        return self._failed

    def _left(self) -> list[Run]:
        """Reads the results and returns the runs to make."""
        records = self.store.read()
        failed = _failures(records) - self._failures_before
        # Do not wait for failed runs, nor for runs whose inputs are missing.
        self.grid.see(records, lambda run: run.key not in failed and self.inputs.possible(run) is not None)
        left, self._failed = [], 0
        for run in self.grid.runs():
            possible = self.inputs.possible(run)
            if self._is_done(possible or run):
                continue
            if run.key in failed:
                self._failed += 1
            elif possible is not None:
                left.append(possible)
        return left

    def _is_done(self, run: Run) -> bool:
        """Whether a record answers a run and was made with the current rows and backbone, if there are any."""
        answers = self.grid.answers(run)
        if not answers or self.inputs.possible(run) is None:
            return bool(answers)
        here = self.inputs.fingerprints(run)
        # Format 1 hashed only 64 rows, so its fingerprints cannot be compared.
        return any(one.get("format", 1) == 1 or _agree(one["fingerprints"], here) for one in answers)

    def _try(self, run: Run) -> bool:
        """Makes a run unless another process is making or has made it. Returns whether there is a new result."""
        digest = run.digest(self.inputs.fingerprints(run))
        try:
            with self.store.lock(digest).acquire(blocking=False):
                # Another process may have made the run since the list was read.
                if any(one.key == run.key for one in self._left()):
                    self._make(run, digest)
        except Timeout:
            return False
        return True

    def _make(self, run: Run, digest: str) -> None:
        folder = self.store.run_folder(digest)
        record = {"run": digest, "label": run.label, **run.says}
        record |= {"fingerprints": self.inputs.fingerprints(run), "revision": revision()}
        try:
            record |= self.execute(run, folder, self.inputs)
        except Exception as error:
            if not isinstance(error, UnfinishedRunError):
                # Resuming from its checkpoints would fail again, and they would keep a full disk full.
                shutil.rmtree(folder, ignore_errors=True)
            if is_disk_full(error):
                raise MiLoraError(
                    f"The disk of {self.store.folder} is full: {run.label} was not finished. Finished runs are kept; "
                    "make room and give the same command again."
                ) from error
            message = " ".join(f"{type(error).__name__}: {error}".split())
            record |= {"status": FAILED, "error": message}
            result = f"failed, {message}"
        else:
            tests = ", ".join(f"{name} {_score(score)}" for name, score in record["tests"].items())
            result = f"{tests or 'routes'} in {record['seconds']['total']:.0f} s"
        self.store.append({**record, "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds")})
        if record["status"] == FINISHED:
            # Removed only now: before the record is written, the folder is the only result of the run.
            shutil.rmtree(folder, ignore_errors=True)
        self.say(f"{run.label}: {result}")


def _failures(records: list[Record]) -> Counter[str]:
    return Counter(key_of(record) for record in records if record["status"] == FAILED)


def _agree(recorded: Record, here: Record) -> bool:
    """Whether a run's inputs match a record. The record may have more tests."""
    parts = [here[split].items() <= recorded[split].items() for split in ("train", "dev", "test")]
    return recorded["backbone"] == here["backbone"] and all(parts)


def _score(of_test: Record) -> str:
    return f"{of_test['accuracy']:.1%}" if "accuracy" in of_test else f"{of_test['score'] or 0:.2f} of 10"
