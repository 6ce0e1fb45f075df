"""The numbers of tables: medians over seeds, averages over tasks, shares of experts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reproduction.experiments import Section
from reproduction.grid import Grid
from reproduction.store import Record

Results = Mapping[tuple[str, str], Sequence[Record | None]]
"""The records of a section's numbers by row and column: one for each seed, `None` if missing."""


def results(grid: Grid, section: Section) -> Results:
    """Looks up the records of a section."""
    return {
        (row.label, column): [grid.record(cell) for cell in cells]
        for row in section.rows
        for column, cells in row.cells.items()
    }


@dataclass(frozen=True)
class Summary:
    """Values, one per seed, and the number of requested seeds."""

    values: tuple[float, ...]
    asked: int

    @property
    def median(self) -> float:
        """The middle value, or the mean of the two in the middle."""
        return statistics.median(self.values)

    def __str__(self) -> str:
        """`78.2 (77.0 to 79.1)`: median, minimum and maximum; also the number of seeds if some are missing."""
        spread = f"{min(self.values):.1f} to {max(self.values):.1f}" if len(self.values) > 1 else ""
        partial = f"{len(self.values)} of {self.asked} seeds" if len(self.values) < self.asked else ""
        inside = "; ".join(part for part in (spread, partial) if part)
        return f"{self.median:.1f} ({inside})" if inside else f"{self.median:.1f}"


def summary(found: Results, row: str, *columns: str) -> Summary | None:
    """Summarises a column in percent (MT-Bench: the judge's mean grade, of 10), or the average over several columns.

    The average is over the seeds that have all columns. Returns `None` if there is no value.
    """
    by_column = [[_score(record, column) for record in found[row, column]] for column in columns]
    by_seed = [[value for value in values if value is not None] for values in zip(*by_column, strict=True)]
    known = tuple(sum(values) / len(values) for values in by_seed if len(values) == len(columns))
    return Summary(known, len(by_seed)) if known else None


def _score(record: Record | None, column: str) -> float | None:
    test = None if record is None else record["tests"].get(column)
    if test is None:
        return None
    if "score" in test:
        return None if test["score"] is None else float(test["score"])
    return 100.0 * float(test["accuracy"])


@dataclass(frozen=True)
class Shares:
    """The routers' choices for the prompts of a task, as the mean over seeds."""

    experts: list[str]
    blocks: list[int]
    by_block: list[list[float]]  # (blocks, experts): the share of prompts that chose the expert in the block
    overall: list[list[float]]  # (experts, 3): the share of all choices; the minimum and the maximum over seeds
    seeds: int


def shares(found: Results) -> dict[str, Shares]:
    """Figure 2's numbers for each measured task."""
    by_task = {
        task: [one["expert_shares"][task] for one in records if one and one["expert_shares"].get(task)]
        for (_, task), records in found.items()
    }
    return {task: _mean_shares(of_task) for task, of_task in by_task.items() if of_task}


def _mean_shares(records: Sequence[Mapping[str, Any]]) -> Shares:
    share = np.array([record["share"] for record in records])  # (seeds, blocks, experts)
    totals = share.sum(axis=1)
    totals /= np.maximum(totals.sum(axis=1, keepdims=True), 1e-9)
    overall = np.stack([totals.mean(axis=0), totals.min(axis=0), totals.max(axis=0)], axis=1)
    experts, blocks = records[0]["experts"], records[0]["blocks"]
    return Shares(experts, blocks, share.mean(axis=0).tolist(), overall.tolist(), len(records))
