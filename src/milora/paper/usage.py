"""Which finished runs of a folder a report makes use of, and what sets the others apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from milora.methods import method
from milora.paper.grid import Grid
from milora.paper.runs import canonical
from milora.paper.store import FILE, Record, Results
from milora.paper.wording import listed, value_text

SETTINGS = ("settings", "training", "data", "evaluation")
"""Parts of a run's identity that are settings by name."""

WHOLE = ("tasks", "seed", "fingerprints")
"""Parts that are told as one. Which tests it has follows from these and from the data at hand."""


def used_records(grid: Grid, results: Results) -> list[Record]:
    """The records of the grid's runs, tries included, each once."""
    runs = grid.runs(results, lambda digest: True)
    return [results.finished[run.digest] for run in runs if run.digest in results.finished]


def unused_lines(grid: Grid, results: Results) -> list[str]:
    """How many finished runs are in none of the report's numbers, of which methods, and what sets them apart.

    Args:
        grid: What is reported.
        results: What is known of the folder's runs.
    """
    used = used_records(grid, results)
    digests = {record["run"] for record in used}
    others = [record for digest, record in results.finished.items() if digest not in digests]
    if not others:
        return []
    of_method: dict[str, list[dict[str, Any]]] = {}
    for record in used:
        of_method.setdefault(record["method"], []).append(_identity(record))
    counts = Counter(_told(record, grid, of_method.get(record["method"], [])) for record in others)
    runs = "1 finished run" if len(others) == 1 else f"{len(others)} finished runs"
    told = "; ".join(f"{text} ({count})" for text, count in counts.items())
    return [f"This report makes no use of {runs} in `{FILE}`, which its settings do not ask for: {told}."]


def _identity(record: Record) -> dict[str, Any]:
    """What tells a run from others, by where it stands in the record: `training.learning_rate`."""
    settings = {f"{part}.{name}": value for part in SETTINGS for name, value in record[part].items()}
    return {**settings, **{name: record[name] for name in WHOLE}}


def _told(record: Record, grid: Grid, used: Sequence[Mapping[str, Any]]) -> str:
    """A run by its method and by what no used run of that method has; by what was tuned where it shares all values."""
    title = method(record["method"]).title
    if not used:
        return f"{title}, which is not reported"
    own = _identity(record)
    names = dict.fromkeys(name for identity in (own, *used) for name in identity)
    apart = [name for name in names if canonical(own.get(name)) not in {canonical(other.get(name)) for other in used}]
    if "tasks" in apart and "fingerprints" in apart:
        apart.remove("fingerprints")
    if not apart:
        apart = ["tasks", *(f"training.{name}" for name in grid.request.tuned(record["method"]))]
    return f"{title}: {listed([_part(name, own.get(name)) for name in apart])}"


def _part(name: str, value: Any) -> str:
    if name == "tasks":
        return f"trained on {' + '.join(value)}"
    if name == "fingerprints":
        return "other rows or another backbone"
    return f"no {name}" if value is None else f"{name} {value_text(value)}"
