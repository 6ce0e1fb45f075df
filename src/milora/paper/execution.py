"""One run: trains an adapter, tests it, and says everything that came of it; goes on where it was interrupted."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig

from milora.backbone.loading import load_adapter, locate
from milora.benchmark.environment import environment
from milora.methods import parameter_counts
from milora.paper.adapter_tests import AdapterTests
from milora.paper.materials import Materials
from milora.paper.revision import revision
from milora.paper.runs import Run
from milora.paper.store import FINISHED, Record
from milora.paper.training_settings import training_arguments
from milora.training import DataArguments, MethodArguments, TrainingArguments, train
from milora.training.checkpoints import last_checkpoint
from milora.training.result import versions
from milora.training.run import load_for_training
from milora_core.files import write_text

PLACES = (
    "output_dir",
    "resume_from_checkpoint",
    "run_name",
    "logging_dir",
    "hub_model_id",
    "hub_token",
    "deepspeed",
    "fsdp_config",
)
"""Fields of `TrainingArguments` that say where something is, and nothing about what comes out."""

MEASURED_SEPARATELY = ("seconds", "load_average", "date")

TRAINED_FILE = "trained.json"
"""In a run's folder when its adapter is complete: what training came to."""


@dataclass(frozen=True)
class Trained:
    """What a run's training came to, as its record has it.

    Attributes:
        full_training: All settings but those at TRL's own defaults.
        dev_perplexity: Of what was kept, or the least that was seen.
        steps: Optimiser steps made.
        epochs: Passes over the training rows made.
        rows: To train on, of dev, and left out for their length.
        parameters: What trained at the end.
        resumed_from_step: Where the run was gone on with, if a process before this one was interrupted.
    """

    full_training: dict[str, Any]
    dev_perplexity: float | None
    steps: int
    epochs: float
    rows: dict[str, int]
    parameters: int
    resumed_from_step: int | None = None


def execute(run: Run, folder: Path, materials: Materials) -> Record:
    """Trains and tests.

    Args:
        run: What to do.
        folder: For the checkpoints, the adapter and the predictions. What an interrupted process left of the run is
            gone on with: from its last checkpoint, or where the adapter is complete, with its tests.
        materials: Where the rows come from.

    Returns:
        The run's record for the results: its identity, its full settings, versions, revision and environment, and what
        came out.

    Raises:
        UnfinishedRunError: If a judge cannot be had: the folder has what the next call needs to go on.
        Exception: Whatever training or generation raises.
    """
    started = time.monotonic()
    data = DataArguments(backbone=run.backbone, task=list(run.tasks), data_dir=materials.data_dir, **run.data)
    arguments, trained = _trained(run, data, folder)
    trained_at = time.monotonic()
    # The very backbone that was trained on: its revision, its dtype, its bits.
    model, tokenizer = load_for_training(data, arguments)
    model = load_adapter(model, folder)
    adapter = AdapterTests(run, model, tokenizer, folder / "predictions", materials)
    tests, shares = adapter.test()
    dev = adapter.dev()
    device = str(model.device)
    del model, adapter
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    finished = time.monotonic()
    counts = parameter_counts(run.method, materials.config(run.backbone), **_without_none(run.settings))
    return {
        "run": run.digest,
        "status": FINISHED,
        "label": run.label,
        "backbone": backbone_name(run.backbone),
        **run.identity,
        "full_training": trained.full_training,
        "tests": tests,
        "dev": dev,
        "expert_shares": shares,
        "dev_perplexity": trained.dev_perplexity,
        "steps": trained.steps,
        "resumed_from_step": trained.resumed_from_step,
        "epochs": trained.epochs,
        "rows": trained.rows,
        "parameters": {
            "tunable": counts.tunable,
            "activated_mean": counts.activated_mean,
            "activated_max": counts.activated_max,
            "trained": trained.parameters,
        },
        "seconds": {
            "total": round(finished - started, 1),
            "training": round(trained_at - started, 1),
            "evaluation": round(finished - trained_at, 1),
        },
        "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "revision": revision(),
        "environment": _environment(device),
    }


def backbone_name(backbone: str) -> str:
    """A backbone's name, without where it lies."""
    return Path(backbone).name if Path(locate(backbone)).is_dir() else backbone


def _trained(run: Run, data: DataArguments, folder: Path) -> tuple[TrainingArguments, Trained]:
    """Trains, as far as the folder does not have it already.

    Returns:
        The arguments, and what training came to; the adapter is in the folder.
    """
    path = folder / TRAINED_FILE
    if path.is_file():
        trained = Trained(**json.loads(path.read_text(encoding="utf-8")))
        return training_arguments(run.training, folder, run.seed), replace(trained, resumed_from_step=trained.steps)
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        shutil.rmtree(folder, ignore_errors=True)
    arguments = training_arguments(run.training, folder, run.seed, resume=checkpoint is not None)
    method = MethodArguments(method=run.method, settings=_without_none(run.settings))
    # The trainer prints a line at every log, in which the grid's own lines would drown.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        result = train(data, method, arguments)
    trained = Trained(
        full_training=_settings(arguments),
        dev_perplexity=result.dev_perplexity_best,
        steps=result.steps,
        epochs=result.epochs,
        rows={"train": result.train_rows, "dev": result.dev_rows, "left_out": result.skipped_rows},
        parameters=result.tunable_parameters,
        resumed_from_step=None if checkpoint is None else int(checkpoint.name.rpartition("-")[2]),
    )
    write_text(path, json.dumps(asdict(trained)) + "\n")
    return arguments, trained


def _without_none(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


@cache
def _library_defaults() -> dict[str, Any]:
    return {one.name: one.default for one in fields(SFTConfig) if one.default is not MISSING}


def _settings(arguments: TrainingArguments) -> dict[str, Any]:
    """All settings of the training but those at TRL's own defaults, which its version tells."""
    own = TrainingArguments.__annotations__
    defaults = _library_defaults()
    return {
        name: value
        for name, value in arguments.to_dict().items()
        if name not in PLACES and (name in own or value != defaults.get(name, MISSING)) and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _environment(device: str) -> dict[str, Any]:
    return {name: value for name, value in environment(device).items() if name not in MEASURED_SEPARATELY}
