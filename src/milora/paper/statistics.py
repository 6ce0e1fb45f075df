"""What is said of several seeds: the median, and how far they lie apart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from milora.paper.grid import Grid
from milora.paper.runs import Cell
from milora.paper.sections import Row
from milora.paper.store import Record, Results

PERCENT = 100.0


@dataclass(frozen=True)
class Summary:
    """Some values, one a seed.

    Attributes:
        values: In the order of the seeds.
        asked: How many seeds there should be.
    """

    values: tuple[float, ...]
    asked: int

    @property
    def median(self) -> float:
        """The middle one, or the mean of the two in the middle."""
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """The least."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The greatest."""
        return max(self.values)


class Measurements:
    """The results of a grid by row and column.

    Args:
        grid: The grid.
        results: What is known of its runs.
    """

    def __init__(self, grid: Grid, results: Results) -> None:
        self.grid = grid
        self.results = results

    def record(self, cell: Cell) -> Record | None:
        """The record of a cell's run, if that has finished."""
        run = self.grid.run(cell, self.results, lambda digest: True)
        return None if run is None else self.results.finished.get(run.digest)

    def records(self, row: Row, column: str) -> list[Record]:
        """The records behind a number, one for each seed that has finished."""
        found = (self.record(cell) for cell in row.cells.get(column, ()))
        return [record for record in found if record is not None]

    def accuracy(self, row: Row, column: str) -> Summary | None:
        """In percent, of MT-Bench the judge's mean grade, of 10; `None` without any."""
        values = [self._accuracy(record, column) for record in self.records(row, column)]
        known = tuple(value for value in values if value is not None)
        return Summary(known, len(row.cells[column])) if known else None

    def average(self, row: Row, columns: Sequence[str]) -> Summary | None:
        """The mean over columns for each seed that has all of them."""
        by_seed = zip(*(row.cells[column] for column in columns), strict=True)
        means = []
        for cells in by_seed:
            records = [self.record(cell) for cell in cells]
            values = [
                None if record is None else self._accuracy(record, column)
                for record, column in zip(records, columns, strict=True)
            ]
            known = [value for value in values if value is not None]
            if len(known) == len(columns):
                means.append(sum(known) / len(known))
        return Summary(tuple(means), len(row.cells[columns[0]])) if means else None

    @staticmethod
    def _accuracy(record: Record, column: str) -> float | None:
        test = record["tests"].get(column)
        if test is None:
            return None
        if "score" in test:
            return None if test["score"] is None else float(test["score"])
        return PERCENT * float(test["accuracy"])


def leaders(summaries: Sequence[Summary | None]) -> tuple[int | None, bool]:
    """Which of some summaries has the highest median, and whether it leads beyond the spread.

    It does where even its lowest seed is above every other's highest; with a single seed there is no spread to judge
    by, and nobody does.

    Returns:
        The index (`None` where nothing is known, or two share the highest median), and whether it leads.
    """
    known = [(index, summary) for index, summary in enumerate(summaries) if summary is not None]
    if not known:
        return None, False
    best, first = max(known, key=lambda pair: pair[1].median)
    others = [summary for index, summary in known if index != best]
    if any(summary.median == first.median for summary in others):
        return None, False
    seeds = min(len(summary.values) for _, summary in known)
    return best, bool(others) and seeds > 1 and all(first.low > summary.high for summary in others)
