"""`results.json`: what was measured of one model with one choice of settings, to which later calls add."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from milora_core.errors import MiLoraError

if TYPE_CHECKING:
    from milora.tasks.task import Task

FILE_NAME = "results.json"
FIGURES = ("accuracy", "perplexity", "score", "pairwise")
"""What is measured of a task: the fields that only a call which measures it can write anew."""

ELSEWHERE = "give another --output-dir, or remove the file"

Results: TypeAlias = dict[str, dict[str, Any]]
"""By task, what was measured."""


def read_results(path: Path, about: Mapping[str, Any], tasks: Collection[Task], figures: Collection[str]) -> Results:
    """What a file has from earlier calls, to which others are added.

    With another `limit` it is begun anew, if everything that it has is measured again.

    Args:
        path: The file; without one there are no results.
        about: What all results depend on, as far as it is known yet.
        tasks: What is to be measured now.
        figures: Which of [`FIGURES`] are to be measured now.

    Raises:
        MiLoraError: If it is of another model or other settings, or it is no file of results.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        earlier = {name: dict(result) for name, result in found["tasks"].items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (AttributeError, ValueError, KeyError, TypeError) as error:
        raise MiLoraError(f"{path} is no file of results of milora evaluate: {ELSEWHERE}.") from error
    shots = {task.name: shots_of(task) for task in tasks}
    different = [name for name, value in about.items() if found.get(name) != value]
    kept = [
        name
        for name, result in earlier.items()
        if name not in shots or not {figure for figure in FIGURES if figure in result} <= set(figures)
    ]
    if different == ["limit"] and not kept:
        return {}
    if different:
        name = different[0]
        raise MiLoraError(
            f"{path} has results with another {name} ({found.get(name)!r}, and now {about[name]!r}): {ELSEWHERE}."
        )
    for name, number in shots.items():
        before = earlier.get(name, {}).get("shots", number)
        if before != number:
            raise MiLoraError(f"{path} has results of {name} with {before} shots, and now {number}: {ELSEWHERE}.")
    return earlier


def shots_of(task: Task) -> int | None:
    """How many solved examples stand before each of a task's questions, `None` if it has none to show."""
    return getattr(task, "shots", None)


def merged(earlier: Mapping[str, Mapping[str, Any]], measured: Mapping[str, Mapping[str, Any]]) -> Results:
    """Earlier results with those of now in them: a task keeps what was not measured again.

    What is known of an MT-Bench's answers belongs to these answers: other ones take it away.
    """
    together = {name: dict(result) for name, result in earlier.items()}
    for name, result in measured.items():
        before = together.get(name, {})
        same_answers = before.get("answers_digest") == result.get("answers_digest")
        together[name] = {**(before if same_answers else {}), **result}
    return together


def with_mean(about: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The object that is printed and kept: `about`, `tasks`, and the means of their accuracies.

    `mean` is of the strict accuracies, `llm_adapters_mean` of those by LLM-Adapters' rule, where a task has one.
    """
    by_their_rule = {name: result["llm_adapters"] for name, result in tasks.items() if result.get("llm_adapters")}
    return {
        **about,
        "tasks": dict(tasks),
        "mean": mean_accuracy(tasks),
        "llm_adapters_mean": mean_accuracy(by_their_rule),
    }


def mean_accuracy(results: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The mean of the tasks' accuracies, each task with the same weight; `None` if none has one."""
    accuracies = [result["accuracy"] for result in results.values() if result.get("accuracy") is not None]
    return sum(accuracies) / len(accuracies) if accuracies else None


def failures(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each task that lacks judgements, grades and comparisons together: how many, and why the first one."""
    lines = []
    for name, result in results.items():
        parts = [result, result.get("pairwise", {})]
        count = sum(part.get("failed", 0) for part in parts)
        reason = next((str(part["reason"]) for part in parts if part.get("reason")), "no reason given")
        if count:
            again = "the same command asks for them again"
            noun = "judgement" if count == 1 else "judgements"
            lines.append(f"{name}: {count} {noun} could not be had, {again}: {' '.join(reason.split())}")
    return lines
