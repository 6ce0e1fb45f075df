"""`results.json`: entries that are kept, and files that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from milora.evaluation.results import failures, merged, read_results, with_mean
from milora.tasks import registry
from milora_core.errors import MiLoraError

ABOUT = {"adapter": "a", "limit": 5, "seed": 0}
BOTH = {
    "bbh": {"split": "test", "shots": 0, "accuracy": 0.5, "perplexity": 3.0},
    "boolq": {"split": "test", "accuracy": 1.0},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "results.json").write_text(json.dumps(with_mean(ABOUT, BOTH)))
    return tmp_path / "results.json"


def read(path: Path, *tasks: str, figures: tuple[str, ...] = ("accuracy",), **changed: Any) -> dict[str, Any]:
    found = [registry.get(name, path.parent) for name in tasks]
    return read_results(path, {**ABOUT, **changed}, found, figures)


def test_what_is_there_is_read(path: Path) -> None:
    assert read(path, "boolq") == BOTH
    assert read(path.parent / "none.json", "boolq") == {}
    assert json.loads(path.read_text())["mean"] == 0.75


@pytest.mark.parametrize(
    ("tasks", "figures", "is_covered"),
    [
        (("bbh", "boolq"), ("accuracy", "perplexity"), True),
        (("bbh", "boolq", "piqa"), ("accuracy", "perplexity"), True),
        (("bbh",), ("accuracy", "perplexity"), False),
        (("bbh", "boolq"), ("accuracy",), False),
    ],
)
def test_another_limit_takes_nothing_away(
    path: Path, tasks: tuple[str, ...], figures: tuple[str, ...], is_covered: bool
) -> None:
    if is_covered:
        assert read(path, *tasks, figures=figures, limit=6) == {}
    else:
        with pytest.raises(MiLoraError, match=r"another limit \(5, and now 6\): give another --output-dir"):
            read(path, *tasks, figures=figures, limit=6)


def test_other_settings_and_other_shots_are_refused(path: Path) -> None:
    with pytest.raises(MiLoraError, match=r"another seed \(0, and now 1\)"):
        read(path, "bbh", "boolq", figures=("accuracy", "perplexity"), seed=1)
    few_shot = [registry.get("bbh", path.parent, shots=3)]
    with pytest.raises(MiLoraError, match=r"results of bbh with 0 shots, and now 3: give another"):
        read_results(path, ABOUT, few_shot, ("accuracy",))
    assert read(path, "bbh") == BOTH


@pytest.mark.parametrize("content", ["", "[]", '{"tasks": 1}', '{"tasks": ["bbh"]}', '{"tasks": {"bbh": 1}}', "{}"])
def test_what_is_no_file_of_results(path: Path, content: str) -> None:
    path.write_text(content)
    with pytest.raises(MiLoraError, match="is no file of results"):
        read(path, "bbh")


def test_a_task_keeps_what_is_not_measured_again() -> None:
    now = {"bbh": {"split": "test", "shots": 0, "perplexity": 2.0}, "piqa": {"accuracy": 0.0}}
    together = merged(BOTH, now)
    assert together == {
        "bbh": {"split": "test", "shots": 0, "accuracy": 0.5, "perplexity": 2.0},
        "boolq": BOTH["boolq"],
        "piqa": {"accuracy": 0.0},
    }
    assert with_mean(ABOUT, together)["mean"] == 0.5
    assert with_mean(ABOUT, {"bbh": now["bbh"]})["mean"] is None


def test_scores_belong_to_their_answers() -> None:
    judged = {"mt-bench": {"answers_digest": "1", "judge": "j", "score": 7, "pairwise": {"judge": "j", "wins": 2}}}
    assert merged(judged, {"mt-bench": {"answers_digest": "1", "judge": "k", "score": 6}}) == {
        "mt-bench": {"answers_digest": "1", "judge": "k", "score": 6, "pairwise": {"judge": "j", "wins": 2}}
    }
    other = {"mt-bench": {"answers_digest": "2", "questions": 80}}
    assert merged(judged, other) == other


def test_failures_of_grades_and_comparisons_are_one_line() -> None:
    missing = {"failed": 2, "reason": None, "pairwise": {"failed": 1, "reason": "The judge\nsleeps."}}
    assert failures({"mt-bench": missing, "boolq": {"accuracy": 1}, "other": {"failed": 0}}) == [
        "mt-bench: 3 judgements could not be had, the same command asks for them again: The judge sleeps."
    ]
