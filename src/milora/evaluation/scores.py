"""Scores of graded rows: accuracy with its confidence interval, overall and by group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

from milora.tasks import llm_adapters

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """Counts of graded rows.

    Attributes:
        rows: Number of rows.
        correct: Number of correct rows.
        unparsed: Number of rows whose output has no readable answer. They are wrong.
        no_room: Number of rows skipped because an answer would exceed the backbone's positions. They are wrong and do
            not count as `unparsed`.
    """

    rows: int
    correct: int
    unparsed: int
    no_room: int

    @property
    def accuracy(self) -> float | None:
        """The share of correct rows, or `None` without rows."""
        return self.correct / self.rows if self.rows else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval of the accuracy (Wilson's score), or `None` without rows."""
        return wilson_interval(self.correct, self.rows) if self.rows else None

    def to_dict(self) -> dict[str, Any]:
        """The score for JSON."""
        return {"rows": self.rows, **self.accuracy_to_dict(), "unparsed": self.unparsed, "no_room": self.no_room}

    def accuracy_to_dict(self) -> dict[str, Any]:
        """`correct`, `accuracy` and its `interval`, for JSON."""
        interval = self.interval
        return {
            "correct": self.correct,
            "accuracy": self.accuracy,
            "interval": None if interval is None else [round(bound, 6) for bound in interval],
        }


@dataclass(frozen=True)
class Scores:
    """The score of all rows, and of each group if rows have groups."""

    whole: Score
    groups: dict[str, Score] = field(default_factory=dict)

    @property
    def macro_accuracy(self) -> float | None:
        """The unweighted mean of the groups' accuracies, or `None` without groups."""
        accuracies = [score.correct / score.rows for score in self.groups.values()]
        return sum(accuracies) / len(accuracies) if accuracies else None


def score(rows: Sequence[dict[str, Any]]) -> Scores:
    """Counts rows of [`milora.evaluation.predictions.Predictions`]. Rows without a gold answer are ignored."""
    judged = [row for row in rows if "correct" in row]
    names = sorted({row["group"] for row in judged if row.get("group") is not None})
    groups = {name: _count([row for row in judged if row.get("group") == name]) for name in names}
    return Scores(_count(judged), groups)


def score_as_llm_adapters(task: str, rows: Sequence[dict[str, Any]]) -> Score | None:
    """The score of the same rows with LLM-Adapters' rule, or `None` if LLM-Adapters does not have the task.

    See [`milora.tasks.llm_adapters`].
    """
    if task not in llm_adapters.TASKS:
        return None
    judged = [row for row in rows if "correct" in row]
    return _count([row | {"correct": llm_adapters.is_correct(task, row["output"], row["answer"])} for row in judged])


def wilson_interval(correct: int, rows: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927). It is also accurate near 0 and 1 and for few rows.

    With p = correct / rows, n = rows and z the normal quantile of the confidence:
    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n).
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = correct / rows
    middle = share + z * z / (2 * rows)
    half = z * math.sqrt(share * (1 - share) / rows + (z / (2 * rows)) ** 2)
    scale = 1 + z * z / rows
    # At 0 and 1, rounding could otherwise exclude the share from the interval.
    return max(0.0, min(share, (middle - half) / scale)), min(1.0, max(share, (middle + half) / scale))


def _count(rows: Sequence[dict[str, Any]]) -> Score:
    no_room = sum(bool(row.get("no_room")) for row in rows)
    return Score(
        rows=len(rows),
        correct=sum(row["correct"] for row in rows),
        unparsed=sum(row["parsed"] is None for row in rows) - no_room,
        no_room=no_room,
    )
