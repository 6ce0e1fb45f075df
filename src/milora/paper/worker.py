"""Works through a grid: takes one free run after the other, until all have finished or failed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from milora.paper.grid import Grid
from milora.paper.materials import Materials
from milora.paper.revision import revision
from milora.paper.runs import Cell, Run, UnfinishedRunError
from milora.paper.store import FAILED, Record, Results, ResultStore
from milora_core.errors import MiLoraError
from milora_core.files import is_disk_full

Execute = Callable[[Run, Path, Materials], Record]
Say = Callable[[str], None]

WAIT = 2.0
"""Seconds until runs that other processes hold are looked at again."""


@dataclass(frozen=True)
class Progress:
    """Where a grid stands.

    Attributes:
        finished: Runs with a result.
        failed: Runs that failed in this call.
        left: Runs without either.
        awaited: Cells whose run is known only when what is tuned for them has been.
    """

    finished: int
    failed: int
    left: int
    awaited: int


class Worker:
    """A process's part in a grid.

    Args:
        grid: The runs.
        store: Where results are.
        cells: The process's share of the grid; by default all.
        execute: Makes a run; [`milora.paper.execution.execute`] by default.
        say: Told in a line what is done.
    """

    def __init__(
        self,
        grid: Grid,
        store: ResultStore,
        cells: list[Cell] | None = None,
        execute: Execute | None = None,
        say: Say = lambda _: None,
    ) -> None:
        self._grid = grid
        self._store = store
        self._cells = grid.cells() if cells is None else cells
        self._execute = execute or _execution()
        self._say = say
        # A run that failed before is tried again; one that fails now is not, whichever process it failed in.
        self._failures_before = {digest: len(messages) for digest, messages in store.read().failures.items()}

    def work(self) -> Progress:
        """Makes every run that is not finished, and waits for those that other processes are making.

        A run that fails is recorded with its message and does not stop the others.

        Raises:
            MiLoraError: If a result cannot be written, such as on a full disk; what has finished is kept.
        """
        self._store.prepare()
        waiting = False
        while True:
            made = False
            for run in self._open():
                made = self._try(run) or made
            left = self._open()
            if not left:
                return self.progress()
            if not made:
                if not waiting:
                    self._say(f"Waiting for {len(left)} runs that other processes are making.")
                waiting = True
                time.sleep(WAIT)

    def progress(self) -> Progress:
        """Where the process's share stands."""
        results = self._store.read()
        runs = self._runs(results)
        failed = sum(self._has_failed(run.digest, results) for run in runs)
        finished = sum(run.digest in results.finished for run in runs)
        awaited = self._grid.awaited(self._cells, results, self._settled(results))
        return Progress(finished, failed, len(runs) - finished - failed, len(awaited))

    def _runs(self, results: Results) -> list[Run]:
        return self._grid.runs(results, self._settled(results), self._cells)

    def _open(self) -> list[Run]:
        results = self._store.read()
        is_settled = self._settled(results)
        return [run for run in self._runs(results) if not is_settled(run.digest)]

    def _settled(self, results: Results) -> Callable[[str], bool]:
        return lambda digest: digest in results.finished or self._has_failed(digest, results)

    def _has_failed(self, digest: str, results: Results) -> bool:
        failures = len(results.failures.get(digest, ()))
        return digest not in results.finished and failures > self._failures_before.get(digest, 0)

    def _try(self, run: Run) -> bool:
        """Makes a run unless another process has it or has made it; returns whether there is a new result."""
        try:
            with FileLock(self._store.lock(run.digest), blocking=False):
                # It may have been made since the list of runs was.
                if not self._settled(self._store.read())(run.digest):
                    self._make(run)
        except Timeout:
            return False
        return True

    def _make(self, run: Run) -> None:
        folder = self._store.run_folder(run.digest)
        try:
            record = self._execute(run, folder, self._grid.materials)
        except Exception as error:
            if not isinstance(error, UnfinishedRunError):
                # Its checkpoints would fail again, and keep a full disk full. What was interrupted is kept.
                shutil.rmtree(folder, ignore_errors=True)
            if is_disk_full(error):
                raise MiLoraError(
                    f"The disk of {self._store.folder} is full: {run.label} was not finished. Finished runs are kept; "
                    "make room and give the same command again, which goes on where this ended."
                ) from error
            message = " ".join(f"{type(error).__name__}: {error}".split())
            self._store.append(
                {
                    "run": run.digest,
                    "status": FAILED,
                    "label": run.label,
                    **run.identity,
                    "error": message,
                    "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    "revision": revision(),
                }
            )
            self._say(f"{run.label}: failed, {message}")
            return
        self._store.append(record)
        # Not before: until the record is written, the folder is all that there is of the run.
        shutil.rmtree(folder, ignore_errors=True)
        self._say(f"{run.label}: {_summary(record)}")


def _execution() -> Execute:
    from milora.paper.execution import execute

    return execute


def _summary(record: Record) -> str:
    tests = record.get("tests") or {}
    told = ", ".join(f"{name} {_score(score)}" for name, score in tests.items())
    return f"{told or 'routes'} in {record.get('seconds', {}).get('total', 0):.0f} s"


def _score(of_test: Record) -> str:
    """Accuracy, or the grade of a judge."""
    return f"{of_test['accuracy']:.1%}" if "accuracy" in of_test else f"{of_test['score'] or 0:.2f} of 10"
