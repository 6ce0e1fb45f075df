"""Grids without data or training: every input is available, and a test decides each run's result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from milora.backbone.shapes import shape_config
from reproduction.grid import Grid, Run
from reproduction.inputs import Inputs
from reproduction.settings import read_request
from reproduction.store import FINISHED, Record

TASKS = ("bundled-choice", "bundled-extraction")
FINGERPRINTS = {"backbone": "b", "train": {}, "dev": {}, "test": {}}


class EverythingAtHand(Inputs):
    """Inputs that are all available, except for tasks that a test marks as missing."""

    def __init__(self, request: Any, missing: Mapping[str, str] | None = None) -> None:
        super().__init__(request)
        self.missing = dict(missing or {})

    def possible(self, run: Run) -> Run | None:
        return None if set(run.tasks) & set(self.missing) else run

    def fingerprints(self, run: Run) -> dict[str, Any]:
        return FINGERPRINTS


def grid(records: Any = (), **settings: Any) -> Grid:
    """A grid with the paper's settings, with two tasks and two seeds by default."""
    values = {"tasks": TASKS, "seeds": (0, 1), "budget": "paper", "data_dir": None, **settings}
    return Grid(read_request(None, values), records, lambda backbone: shape_config("tiny"))


def record(run: Run, accuracy: float = 0.5, /, **values: Any) -> Record:
    """The record of a finished run."""
    tests = {
        test: {"accuracy": accuracy, "rows": 10, "correct": round(10 * accuracy), "unparsed": 0, "no_room": 0}
        for test in run.tests
    }
    return {
        "run": run.digest(FINGERPRINTS),
        "fingerprints": FINGERPRINTS,
        "status": FINISHED,
        "label": run.label,
        **run.says,
        "full_training": {"learning_rate": 1e-4, **run.training},
        "tests": tests,
        "expert_shares": {},
        "dev_perplexity": 2.0,
        "steps": 1,
        "rows": {"train": 4, "dev": 2, "left_out": 0},
        "parameters": {"tunable": 100, "activated_mean": 50, "activated_max": 60, "trained": 100},
        "seconds": {"total": 10.0},
        "versions": {"torch": "1"},
        "revision": "abc",
        "environment": {"processor": "p", "threads": 1, "gpu": None},
        **values,
    }


def instantly(run: Run, folder: Path, inputs: Inputs) -> Record:
    """An `execute` that takes no time."""
    return record(run)
