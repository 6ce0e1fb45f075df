"""What a grid still has to do, and about how long that takes. Reads records only: no data, no backbone, no network."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from reproduction.grid import Grid
from reproduction.store import Record


def make_plan(grid: Grid, records: Sequence[Record]) -> dict[str, Any]:
    """The runs of a grid with their state, and an estimate from the seconds of finished runs.

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
        alike = [one for one in timed if one["method"] == run.method] or timed
        runs.append({"label": run.label, "state": state, "seconds": _median(alike) if alike else None})
    later = grid.waiting()
    left = [one["seconds"] for one in runs if one["state"] != "finished"]
    whole = sum(left) + len(later) * _median(timed) if timed else None
    return {"runs": runs, "later": later, "seconds": whole}


def summary(plan: dict[str, Any]) -> str:
    """The plan in a line."""
    finished = sum(one["state"] == "finished" for one in plan["runs"])
    left = len(plan["runs"]) - finished + len(plan["later"])
    seconds = plan["seconds"]
    about = "" if seconds is None or not left else f", about {timedelta(seconds=round(seconds))} in one process"
    return f"{finished} runs have finished, {left} are left{about}."


def _median(records: Sequence[Record]) -> float:
    return statistics.median(float(record["seconds"]["total"]) for record in records)
