"""Scores of a set of judgements."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from milora.evaluation.mt_bench.judging import UNPARSED
from milora.tasks.mt_bench import Question


def grades(records: Sequence[Mapping[str, Any]], questions: Sequence[Question]) -> dict[str, Any]:
    """Mean grades: `score` over both turns (MT-Bench's score), by turn and by category, and the count of `unparsed`.

    As in FastChat, judgements without a grade are excluded from the means. They are counted in `unparsed`. A mean
    without grades is `None`.
    """
    category = {question.id: question.category for question in questions}
    graded = [record for record in records if record["score"] != UNPARSED]
    return {
        "score": _mean(record["score"] for record in graded),
        "turns": {str(turn): _mean(r["score"] for r in graded if r["turn"] == turn) for turn in (1, 2)},
        "categories": {
            name: _mean(r["score"] for r in graded if category[r["question_id"]] == name)
            for name in dict.fromkeys(category.values())
        },
        "judgements": len(records),
        "unparsed": len(records) - len(graded),
    }


def wins(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first model's wins, ties and losses. As in FastChat, a model wins if it wins in both positions.

    `win_rate` counts a tie as half a win. Pairs with a judgement without a verdict count only in `unparsed`.
    """
    counts = {"wins": 0, "ties": 0, "losses": 0, "unparsed": 0}
    for record in records:
        first, second = record["g1_winner"], record["g2_winner"]
        if "error" in (first, second):
            counts["unparsed"] += 1
        elif first == second == "model_1":
            counts["wins"] += 1
        elif first == second == "model_2":
            counts["losses"] += 1
        else:
            counts["ties"] += 1
    played = len(records) - counts["unparsed"]
    return {**counts, "win_rate": (counts["wins"] + counts["ties"] / 2) / played if played else None}


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return fmean(found) if found else None
