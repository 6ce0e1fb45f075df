"""What is said of judged rows: accuracy with its interval, whole and by group."""

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
    """How many of some rows are right.

    Attributes:
        rows: All rows.
        correct: Those that are right.
        unparsed: Those whose output gives no answer that could be read; they are wrong.
        no_room: Those whose prompt leaves no room for an answer in the backbone; they are wrong, and not `unparsed`.
    """

    rows: int
    correct: int
    unparsed: int
    no_room: int

    @property
    def accuracy(self) -> float | None:
        """The share of right rows, `None` of none."""
        return self.correct / self.rows if self.rows else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the accuracy lies with a confidence of 95 %, by Wilson's score; `None` without rows."""
        return wilson_interval(self.correct, self.rows) if self.rows else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
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
    """The score of all rows, and of each group where rows have one."""

    whole: Score
    groups: dict[str, Score] = field(default_factory=dict)

    @property
    def macro_accuracy(self) -> float | None:
        """The mean of the groups' accuracies, each group with the same weight; `None` without groups."""
        accuracies = [score.correct / score.rows for score in self.groups.values()]
        return sum(accuracies) / len(accuracies) if accuracies else None


def score(rows: Sequence[dict[str, Any]]) -> Scores:
    """Counts rows of [`milora.evaluation.predictions.Predictions`]; those without a gold answer are left out."""
    judged = [row for row in rows if "correct" in row]
    names = sorted({row["group"] for row in judged if row.get("group") is not None})
    groups = {name: _count([row for row in judged if row.get("group") == name]) for name in names}
    return Scores(_count(judged), groups)


def score_as_llm_adapters(task: str, rows: Sequence[dict[str, Any]]) -> Score | None:
    """The same rows counted by the rule of LLM-Adapters' scripts; `None` where it has no such task.

    See [`milora.tasks.llm_adapters`].
    """
    if task not in llm_adapters.TASKS:
        return None
    judged = [row for row in rows if "correct" in row]
    return _count([row | {"correct": llm_adapters.is_correct(task, row["output"], row["answer"])} for row in judged])


def wilson_interval(correct: int, rows: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927), which is right near 0 and 1 and for few rows too.

    With p = correct / rows, n = rows and z the normal quantile of the confidence:
    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n).
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = correct / rows
    middle = share + z * z / (2 * rows)
    half = z * math.sqrt(share * (1 - share) / rows + (z / (2 * rows)) ** 2)
    scale = 1 + z * z / rows
    # Rounding must not put the share itself outside, where the interval ends at 0 or 1.
    return max(0.0, min(share, (middle - half) / scale)), min(1.0, max(share, (middle + half) / scale))


def _count(rows: Sequence[dict[str, Any]]) -> Score:
    no_room = sum(bool(row.get("no_room")) for row in rows)
    return Score(
        rows=len(rows),
        correct=sum(row["correct"] for row in rows),
        unparsed=sum(row["parsed"] is None for row in rows) - no_room,
        no_room=no_room,
    )
