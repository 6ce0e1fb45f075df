"""A grid without materials or training: every task is at hand, and a run is whatever a test says it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from milora.backbone.shapes import shape_config
from milora.paper.grid import Grid
from milora.paper.materials import Materials
from milora.paper.request_reading import read_request
from milora.paper.runs import Run
from milora.paper.store import FINISHED, Record

TASKS = ("bundled-choice", "bundled-extraction")


class EverythingAtHand(Materials):
    """Materials that are not looked at."""

    def __init__(self, missing: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._missing = missing or {}

    def config(self, backbone: str) -> Any:
        return shape_config("tiny")

    def backbone_missing(self, backbone: str) -> str | None:
        return self._missing.get(backbone)

    def backbone_fingerprint(self, backbone: str) -> str:
        return backbone

    def rows_missing(self, task: str, split: str) -> str | None:
        return self._missing.get(task)

    def rows_fingerprint(self, task: str, split: str) -> str:
        return f"{task}/{split}"


def grid(missing: Mapping[str, str] | None = None, **flags: Any) -> Grid:
    """A grid of the paper's settings; two tasks and two seeds unless a test says otherwise."""
    values = {"tasks": TASKS, "seeds": (0, 1), "budget": "paper", **flags}
    return Grid(read_request(None, values), EverythingAtHand(missing))


def record(run: Run, accuracy: float = 0.5, **values: Any) -> Record:
    """What a run that has finished leaves behind."""
    tests = {
        test: {"accuracy": accuracy, "rows": 10, "correct": round(10 * accuracy), "unparsed": 0, "no_room": 0}
        for test in run.tests
    }
    return {
        "run": run.digest,
        "status": FINISHED,
        "label": run.label,
        **run.identity,
        "tests": tests,
        "dev": {},
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


def instantly(run: Run, folder: Path, materials: Materials) -> Record:
    """An `execute` that takes no time."""
    return record(run)
