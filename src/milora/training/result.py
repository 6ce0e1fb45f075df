"""What a training run came to, as a value and as `training_result.json` beside the adapter."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict, dataclass, field
from typing import Any

RESULT_FILE = "training_result.json"
LIBRARIES = ("milora", "torch", "transformers", "peft", "trl", "accelerate", "datasets")


@dataclass(frozen=True)
class TrainingResult:
    """What a training run came to.

    Attributes:
        output: The adapter's folder.
        method: Its method's name.
        train_rows: Rows trained on.
        dev_rows: Rows of the dev set.
        skipped_rows: Rows left out because they have more tokens than `max_length`.
        rows: By source: `train`, `dev`, `too_long`, and `no_room` (prompts that alone fill `max_length`).
        steps: Optimiser steps made.
        epochs: Passes over the training rows made.
        stopped_early: Whether the dev perplexity ended the run.
        best_step: The step whose adapter was kept; `None` where that is the last.
        seconds: Wall clock, from reading rows to writing the adapter.
        tunable_parameters: What trained at the end, Theta included.
        dev_perplexity_before: Before the first step; `None` where it was not measured then.
        dev_perplexity_best: Of what was kept, or the least that was seen.
        resumed_from: The checkpoint that the run went on from.
    """

    output: str
    method: str
    train_rows: int
    dev_rows: int
    skipped_rows: int
    rows: dict[str, dict[str, int]] = field(default_factory=dict)
    steps: int = 0
    epochs: float = 0.0
    stopped_early: bool = False
    best_step: int | None = None
    seconds: float = 0.0
    tunable_parameters: int = 0
    dev_perplexity_before: float | None = None
    dev_perplexity_best: float | None = None
    resumed_from: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def versions() -> dict[str, str]:
    """Of Python and of the libraries that decide a result."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
