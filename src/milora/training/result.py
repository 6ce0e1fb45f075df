"""The result of a training run, as a value and as `training_result.json` beside the adapter."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from dataclasses import asdict, dataclass, field
from typing import Any

RESULT_FILE = "training_result.json"
LIBRARIES = ("milora", "torch", "transformers", "peft", "trl", "accelerate", "datasets")


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training run.

    Attributes:
        output: The adapter's folder.
        method: Its method's name.
        train_rows: Rows trained on.
        dev_rows: Rows of the dev set.
        skipped_rows: Rows left out because they have more tokens than `max_length`.
        rows: By source: `train`, `dev`, `too_long`, and `no_room` (prompts that alone fill `max_length`).
        steps: Optimiser steps made.
        epochs: Passes over the training rows made.
        stopped_early: Whether early stopping ended the run.
        best_step: The step whose adapter was kept; `None` if it is the last.
        seconds: Wall clock, from reading rows to writing the adapter.
        tunable_parameters: Parameters that train at the end, including Theta.
        dev_perplexity_before: Dev perplexity before the first step; `None` if not measured.
        dev_perplexity_best: Dev perplexity of the kept adapter, or the lowest measured.
        resumed_from: The checkpoint from which the run resumed.
        nonfinite_tensors: Tensors of the written adapter that have NaN or infinity, because the training diverged. Such
            an adapter cannot be loaded.
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
    nonfinite_tensors: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON. NaN and infinity are `None`."""
        result: dict[str, Any] = finite_only(asdict(self))
        return result


def finite_only(value: Any) -> Any:
    """Replaces NaN and infinity, which JSON does not have, by `None` in nested dicts and lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_only(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite_only(each) for each in value]
    return value


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that affect a result."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
