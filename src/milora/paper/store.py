"""The results of runs: an append-only file that any number of processes write to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from milora.records import append_record, drop_half_line, read_records
from milora_core.errors import MiLoraError

FILE = "results.jsonl"
WORKING_FOLDER = ".working"
"""In the output folder: locks, adapters and checkpoints of runs, none of which belongs to the results."""

FINISHED = "finished"
FAILED = "failed"

Record = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """What is known of the runs.

    Attributes:
        finished: By digest, the record of each finished run.
        failures: By digest, the messages of a run's failures, the last one last; also of runs that finished later.
    """

    finished: Mapping[str, Record] = field(default_factory=dict)
    failures: Mapping[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[Record]) -> Results:
        """From records in the order in which they were written."""
        finished: dict[str, Record] = {}
        failures: dict[str, list[str]] = {}
        for record in records:
            if record.get("status") == FINISHED:
                finished.setdefault(record["run"], record)
            elif record.get("status") == FAILED:
                failures.setdefault(record["run"], []).append(str(record.get("error")))
        return cls(finished, failures)


class ResultStore:
    """The results in a folder.

    Args:
        folder: The report's output folder.

    Raises:
        MiLoraError: If the folder cannot be made or is a file.
    """

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise MiLoraError(f"{folder} is a file; give a folder for the report.")
        self.folder = folder
        self.path = folder / FILE
        self.working = folder / WORKING_FOLDER

    def prepare(self) -> None:
        """Makes the folders; what is in the working folder is kept out of version control.

        Raises:
            MiLoraError: If they cannot be made.
        """
        try:
            self.working.mkdir(parents=True, exist_ok=True)
            (self.working / "locks").mkdir(exist_ok=True)
            (self.working / ".gitignore").write_text("*\n", encoding="utf-8")
        except OSError as error:
            raise MiLoraError(f"{self.working} cannot be written to: {error.strerror}.") from error

    def lock(self, digest: str) -> Path:
        """The file of a run's lock."""
        return self.working / "locks" / f"{digest}.lock"

    def run_folder(self, digest: str) -> Path:
        """Where a run may keep its adapter and checkpoints while it works."""
        return self.working / "runs" / digest

    def read(self) -> Results:
        """All results so far; half a line at the end, which a full disk may have left, is passed over.

        Raises:
            DataError: If a whole line is no result.
        """
        if not self.path.exists():
            return Results()
        return Results.of(record for _, record in read_records(self.path))

    def append(self, record: Record) -> None:
        """Adds a record as one line.

        Raises:
            MiLoraError: If it cannot be written; what was there is kept.
        """
        # Locked, because cutting off what a full disk left of a line is safe for one process at a time only.
        with FileLock(self.working / "results.lock"):
            try:
                drop_half_line(self.path)
                append_record(self.path, record)
            except OSError as error:
                raise MiLoraError(
                    f"{self.path} cannot be written to: {error.strerror}. The results in it are kept; make room and "
                    "give the same command again, which goes on where this ended."
                ) from error
