"""The numbers of tables: medians over seeds, averages over tasks, shares of experts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reproduction.experiments import Row, Section
from reproduction.grid import Grid
from reproduction.store import Record

PERCENT = 100.0


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


class Measurements:
    """The results of a grid by row and column.

    Args:
        grid: The grid, with its records.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._found: dict[tuple[int, str], list[Record | None]] = {}

    def by_seed(self, row: Row, column: str) -> list[Record | None]:
        """The record of a number for each seed; `None` if missing."""
        key = (id(row), column)
        if key not in self._found:
            self._found[key] = [self.grid.record(cell) for cell in row.cells[column]]
        return self._found[key]

    def records(self, row: Row, column: str) -> list[Record]:
        """The existing records of a number."""
        return [record for record in self.by_seed(row, column) if record is not None]

    def summary(self, row: Row, section: Section, column: str) -> Summary | None:
        """Summarises a column in percent (MT-Bench: the judge's mean grade, of 10), or the average over columns.

        The average is over the seeds that have all columns. Returns `None` if there is no value.
        """
        columns = section.columns if column == "average" else (column,)
        by_column = [[_score(record, name) for record in self.by_seed(row, name)] for name in columns]
        means = [_mean(values) for values in zip(*by_column, strict=True)]
        known = tuple(value for value in means if value is not None)
        return Summary(known, len(means)) if known else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _score(record: Record | None, column: str) -> float | None:
    test = None if record is None else record["tests"].get(column)
    if test is None:
        return None
    if "score" in test:
        return None if test["score"] is None else float(test["score"])
    return PERCENT * float(test["accuracy"])


@dataclass(frozen=True)
class Shares:
    """The routers' choices for the prompts of a task, as the mean over seeds.

    Attributes:
        experts: The experts' paths in a block.
        blocks: The blocks' numbers.
        by_block: (blocks, experts): the share of prompts that chose the expert in the block.
        overall: (experts, 3): the share of all choices in all blocks; the minimum and the maximum over seeds.
        seeds: Number of seeds.
    """

    experts: list[str]
    blocks: list[int]
    by_block: list[list[float]]
    overall: list[list[float]]
    seeds: int


def shares(section: Section, measured: Measurements) -> dict[str, Shares]:
    """Figure 2's numbers for each measured task."""
    found = {}
    for column in section.columns:
        of_task = [record["expert_shares"].get(column) for record in measured.records(section.rows[0], column)]
        if any(of_task):
            found[column] = _mean_shares([one for one in of_task if one])
    return found


def _mean_shares(records: Sequence[Mapping[str, Any]]) -> Shares:
    share = np.array([record["share"] for record in records])  # (seeds, blocks, experts)
    totals = share.sum(axis=1)
    totals /= np.maximum(totals.sum(axis=1, keepdims=True), 1e-9)
    overall = np.stack([totals.mean(axis=0), totals.min(axis=0), totals.max(axis=0)], axis=1)
    experts, blocks = records[0]["experts"], records[0]["blocks"]
    return Shares(experts, blocks, share.mean(axis=0).tolist(), overall.tolist(), len(records))
