"""What a grid still has to do, and about how long that takes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from milora.paper.grid import Grid
from milora.paper.runs import Cell, Run
from milora.paper.store import Record, Results

SECONDS_A_RUN = 60.0
"""A guess, for as long as no run has finished."""

FINISHED, FAILED, OPEN = "finished", "failed before", "open"


@dataclass(frozen=True)
class Planned:
    """A run that can be named already."""

    run: Run
    state: str
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What there is to do.

    Attributes:
        runs: Those that can be named.
        later: Labels of the runs whose settings depend on tries.
        later_seconds: What they take.
        missing: What cannot be run and why, a line each.
        basis: What the estimate rests on.
    """

    runs: tuple[Planned, ...]
    later: tuple[str, ...]
    later_seconds: float
    missing: tuple[str, ...]
    basis: str

    @property
    def seconds(self) -> float:
        """Of what is still to do, one run after the other."""
        return sum(planned.seconds for planned in self.runs if planned.state != FINISHED) + self.later_seconds

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "runs": [
                {"run": p.run.digest, "label": p.run.label, "state": p.state, "seconds": round(p.seconds, 1)}
                for p in self.runs
            ],
            "later": list(self.later),
            "missing": list(self.missing),
            "seconds": round(self.seconds),
            "basis": self.basis,
        }


def make_plan(grid: Grid, results: Results, cells: Sequence[Cell], guess: float | None = None) -> Plan:
    """Lists the runs of some cells.

    Args:
        grid: The grid.
        results: What has been done.
        cells: Of the grid.
        guess: Seconds of a run, for as long as none has finished.
    """

    def settled(digest: str) -> bool:
        return digest in results.finished

    # The seconds of a run that was interrupted are those of its last part.
    records = [record for record in results.finished.values() if record.get("resumed_from_step") is None]
    default = SECONDS_A_RUN if guess is None else guess
    runs = []
    for run in grid.runs(results, settled, list(cells)):
        done = run.digest in results.finished
        state = FINISHED if done else FAILED if run.digest in results.failures else OPEN
        runs.append(Planned(run, state, _estimate(run.method, len(run.tasks), records, default)))
    later = grid.awaited(list(cells), results, settled)
    seconds = sum(_estimate(cell.variant.method, len(cell.tasks), records, default) for cell in later)
    return Plan(tuple(runs), tuple(map(str, later)), seconds, tuple(_missing(grid, cells)), _basis(records, guess))


def _estimate(method: str, tasks: int, records: Sequence[Record], default: float) -> float:
    """The median of the finished runs that are most alike."""
    of_method = [record for record in records if record["method"] == method]
    alike = [record for record in of_method if len(record["tasks"]) == tasks]
    for found in (alike, of_method, records):
        if found:
            return statistics.median(float(record["seconds"]["total"]) for record in found)
    return default


def _basis(records: Sequence[Record], guess: float | None) -> str:
    if records:
        return f"from the seconds of {len(records)} finished runs, those of the same method where there are some"
    if guess is not None:
        return f"from the {guess:g} s a run that --seconds-per-run gives"
    return f"a guess of {SECONDS_A_RUN:g} s a run, as none has finished yet; --seconds-per-run gives another"


def _missing(grid: Grid, cells: Sequence[Cell]) -> list[str]:
    reasons: dict[str, set[str]] = {}
    for cell in cells:
        for test in cell.tests:
            reason = grid.missing(cell, test)
            if reason is not None:
                reasons.setdefault(reason, set()).add(f"{test} on {cell.backbone}")
    return [f"{', '.join(sorted(places))}: {reason}" for reason, places in reasons.items()]
