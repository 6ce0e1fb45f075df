"""What a grid still has to do, and about how long that takes. Reads records only: no data, no backbone, no network."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from reproduction.grid import Grid
from reproduction.store import Record

HOUR, MINUTE = 3600, 60


def make_plan(grid: Grid, records: Sequence[Record]) -> dict[str, Any]:
    """The runs of a grid with their state, and an estimate from the seconds of finished runs.

    Args:
        grid: The grid.
        records: What has been done.

    Returns:
        `runs` (each with `label`, `state` and `seconds`), `later` (runs whose settings depend on tries), and `seconds`
        of what is left, `None` while no run has finished.
    """
    grid.see(records, lambda key: True)
    # The seconds of a resumed run are those of its last part.
    timed = [one for one in records if one["status"] == "finished" and one.get("resumed_from_step") is None]
    runs = []
    for run in grid.runs():
        state = "finished" if grid.answers(run) else "failed before" if run.key in grid.failed else "open"
        runs.append({"label": run.label, "state": state, "seconds": _estimate(run.method, len(run.tasks), timed)})
    later = [
        {"label": str(cell), "seconds": _estimate(cell.variant.method, len(cell.tasks), timed)}
        for cell in grid.waiting()
    ]
    left = [one["seconds"] for one in (*runs, *later) if one.get("state") != "finished"]
    return {"runs": runs, "later": later, "seconds": sum(left) if timed else None}


def summary(plan: dict[str, Any]) -> str:
    """The plan in a line."""
    finished = sum(one["state"] == "finished" for one in plan["runs"])
    left = len(plan["runs"]) - finished + len(plan["later"])
    seconds = plan["seconds"]
    about = "" if seconds is None or not left else f", about {_duration(seconds)} in one process"
    return f"{finished} runs have finished, {left} are left{about}."


def _estimate(method: str, tasks: int, records: Sequence[Record]) -> float | None:
    """The median of the finished runs that are most alike; `None` without any."""
    of_method = [record for record in records if record["method"] == method]
    alike = [record for record in of_method if len(record["tasks"]) == tasks]
    found = alike or of_method or records
    return statistics.median(float(record["seconds"]["total"]) for record in found) if found else None


def _duration(seconds: float) -> str:
    if seconds >= HOUR:
        return f"{seconds / HOUR:.1f} hours"
    return f"{seconds / MINUTE:.0f} minutes" if seconds >= 2 * MINUTE else f"{seconds:.0f} seconds"
