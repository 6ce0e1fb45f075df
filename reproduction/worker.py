"""Works through a grid: takes one free run after another until all have finished or failed."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from filelock import Timeout

from milora_core.errors import MiLoraError
from milora_core.files import is_disk_full
from reproduction.adapter_tests import UnfinishedRunError
from reproduction.grid import Grid, Run
from reproduction.inputs import Inputs
from reproduction.run import execute, revision
from reproduction.store import FAILED, Record, Store, key_of

Execute = Callable[[Run, Path, Inputs], Record]

WAIT = 2.0
"""Seconds between checks of runs that other processes are making."""


class Progress(NamedTuple):
    """The numbers of runs with a result, and of runs that failed in this call."""

    finished: int
    failed: int


class Worker:
    """One process that works on a grid: makes runs with `execute` and reports each result as a line to `say`."""

    def __init__(
        self,
        grid: Grid,
        store: Store,
        inputs: Inputs,
        execute: Execute = execute,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._grid = grid
        self._store = store
        self._inputs = inputs
        self._execute = execute
        self._say = say
        # A run that failed before this call is tried again. A run that fails now, in any process, is not.
        self._failures_before = self._failures(store.read())
        self._progress = Progress(0, 0)

    def work(self) -> Progress:
        """Makes every run without a result, and waits for runs that other processes are making.

        A failed run is recorded with its message and does not stop the others.

        Raises:
            MiLoraError: If a result cannot be written, for example on a full disk. Finished runs are kept.
        """
        self._store.prepare()
        is_told = False
        while left := self._left():
            made = [self._try(run) for run in left]
            if not any(made) and (left := self._left()):
                if not is_told:
                    self._say(f"Waiting for {len(left)} runs that other processes are making.")
                is_told = True
                time.sleep(WAIT)
        return self._progress

    def _left(self) -> list[Run]:
        """Reads the results and returns the runs to make."""
        records = self._store.read()
        failed = self._failures(records) - self._failures_before
        # Do not wait for failed runs, nor for runs whose inputs are missing.
        self._grid.see(records, lambda run: run.key not in failed and self._inputs.possible(run) is not None)
        finished, failed_now, left = 0, 0, []
        for run in self._grid.runs():
            possible = self._inputs.possible(run)
            if self._is_done(possible or run):
                finished += 1
            elif run.key in failed:
                failed_now += 1
            elif possible is not None:
                left.append(possible)
        self._progress = Progress(finished, failed_now)
        return left

    def _is_done(self, run: Run) -> bool:
        """Whether a record answers a run and was made with the current rows and backbone, if there are any."""
        answers = self._grid.answers(run)
        if not answers or self._inputs.possible(run) is None:
            return bool(answers)
        here = self._inputs.fingerprints(run)
        # Format 1 hashed only 64 rows, so its fingerprints cannot be compared.
        return any(one.get("format", 1) == 1 or _agree(one["fingerprints"], here) for one in answers)

    @staticmethod
    def _failures(records: list[Record]) -> Counter[str]:
        return Counter(key_of(record) for record in records if record["status"] == FAILED)

    def _try(self, run: Run) -> bool:
        """Makes a run unless another process is making or has made it. Returns whether there is a new result."""
        digest = run.digest(self._inputs.fingerprints(run))
        try:
            with self._store.lock(digest).acquire(blocking=False):
                # Another process may have made the run since the list was read.
                if any(one.key == run.key for one in self._left()):
                    self._make(run, digest)
        except Timeout:
            return False
        return True

    def _make(self, run: Run, digest: str) -> None:
        folder = self._store.run_folder(digest)
        named = {"run": digest, "fingerprints": self._inputs.fingerprints(run)}
        try:
            record = self._execute(run, folder, self._inputs)
        except Exception as error:
            if not isinstance(error, UnfinishedRunError):
                # Resuming from its checkpoints would fail again, and they would keep a full disk full.
                shutil.rmtree(folder, ignore_errors=True)
            if is_disk_full(error):
                raise MiLoraError(
                    f"The disk of {self._store.folder} is full: {run.label} was not finished. Finished runs are kept; "
                    "make room and give the same command again."
                ) from error
            message = " ".join(f"{type(error).__name__}: {error}".split())
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            failure = {"status": FAILED, "label": run.label, "error": message, "finished_at": now}
            self._store.append({**named, **run.says, **failure, "revision": revision()})
            self._say(f"{run.label}: failed, {message}")
            return
        self._store.append({**named, **record})
        # Removed only now: before the record is written, the folder is the only result of the run.
        shutil.rmtree(folder, ignore_errors=True)
        told = ", ".join(f"{name} {_score(score)}" for name, score in record["tests"].items())
        self._say(f"{run.label}: {told or 'routes'} in {record['seconds']['total']:.0f} s")


def _agree(recorded: Record, here: Record) -> bool:
    """Whether a run's inputs match a record. The record may have more tests."""
    parts = [here[split].items() <= recorded[split].items() for split in ("train", "dev", "test")]
    return recorded["backbone"] == here["backbone"] and all(parts)


def _score(of_test: Record) -> str:
    return f"{of_test['accuracy']:.1%}" if "accuracy" in of_test else f"{of_test['score'] or 0:.2f} of 10"
