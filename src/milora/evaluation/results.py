"""`results.json`: the results of one model with one set of settings. Later runs add to the file."""

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
"""The measurements of a task: fields that only a run that measures them may overwrite."""

ELSEWHERE = "give another --output-dir, or remove the file"

Results: TypeAlias = dict[str, dict[str, Any]]
"""Results by task name."""


def read_results(path: Path, about: Mapping[str, Any], tasks: Collection[Task], figures: Collection[str]) -> Results:
    """Reads the results of earlier runs, to add new ones.

    If only `limit` differs and every earlier result is measured again, the earlier results are discarded.

    Args:
        path: The file. If it does not exist, there are no results.
        about: The model and settings that all results depend on, as far as known.
        tasks: The tasks to measure now.
        figures: The [`FIGURES`] to measure now.

    Raises:
        MiLoraError: If the file has results of another model or other settings, or is not a results file.
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
    """The number of solved examples before each question of a task, or `None` if the task has no such setting."""
    return getattr(task, "shots", None)


def merged(earlier: Mapping[str, Mapping[str, Any]], measured: Mapping[str, Mapping[str, Any]]) -> Results:
    """Merges new results into earlier ones. A task keeps the figures that were not measured again.

    MT-Bench's grades belong to one set of answers. New answers remove the earlier grades.
    """
    together = {name: dict(result) for name, result in earlier.items()}
    for name, result in measured.items():
        before = together.get(name, {})
        same_answers = before.get("answers_digest") == result.get("answers_digest")
        together[name] = {**(before if same_answers else {}), **result}
    return together


def with_mean(about: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The object to print and save: `about`, `tasks`, and the means of the tasks' accuracies.

    `mean` is over the strict accuracies, `llm_adapters_mean` over the accuracies with LLM-Adapters' rule, if any.
    """
    by_their_rule = {name: result["llm_adapters"] for name, result in tasks.items() if result.get("llm_adapters")}
    return {
        **about,
        "tasks": dict(tasks),
        "mean": mean_accuracy(tasks),
        "llm_adapters_mean": mean_accuracy(by_their_rule),
    }


def mean_accuracy(results: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The unweighted mean of the tasks' accuracies, or `None` if no task has an accuracy."""
    accuracies = [result["accuracy"] for result in results.values() if result.get("accuracy") is not None]
    return sum(accuracies) / len(accuracies) if accuracies else None


def failures(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line per task with missing judgements (grades and comparisons): their number and the first reason."""
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
