"""One run: trains an adapter, tests it, and returns its record. An interrupted run resumes."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig

from milora.backbone.loading import load_adapter
from milora.benchmark.environment import environment
from milora.methods import METHODS, parameter_counts
from milora.training import DataArguments, MethodArguments, TrainingArguments, train
from milora.training.checkpoints import last_checkpoint
from milora.training.result import RESULT_FILE, versions
from milora.training.training_run import load_for_training
from milora.tuners.milora import MiLoraConfig
from milora_core.errors import MiLoraError
from reproduction.adapter_tests import AdapterTests
from reproduction.grid import Grid, Run
from reproduction.inputs import Inputs, backbone_config
from reproduction.store import FINISHED, Record, canonical, full_settings

ALWAYS: Mapping[str, Any] = {"report_to": "none", "disable_tqdm": True, "push_to_hub": False}
"""Settings of every run, unless the request sets them."""

PLACES = ("output_dir", "resume_from_checkpoint", "run_name", "logging_dir", "hub_model_id", "hub_token", "deepspeed")
"""Fields of `TrainingArguments` that hold locations or names of outputs."""


def execute(run: Run, folder: Path, inputs: Inputs) -> Record:
    """Trains and tests an adapter. Returns the results for the record.

    `folder` holds checkpoints, adapter and predictions. An interrupted run resumes from its last checkpoint, or with
    the remaining tests if the adapter is complete. If the judge cannot be reached, raises an `UnfinishedRunError`; the
    folder keeps everything that the next call needs.
    """
    started = time.monotonic()
    data = DataArguments(backbone=run.backbone, task=list(run.tasks), data_dir=inputs.request.data_dir, **run.data)
    trained = _train(run, data, folder)
    trained_at = time.monotonic()
    # The same backbone as in training: its revision, its dtype.
    model, tokenizer = load_for_training(data, training_arguments(run.training, folder, run.seed))
    model = load_adapter(model, folder)
    scores, shares = AdapterTests(run, model, tokenizer, folder / "predictions", inputs).test()
    device = str(model.device)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    finished = time.monotonic()
    config = backbone_config(run.backbone, network=True)
    counts = parameter_counts(run.method, config, **{k: v for k, v in run.settings.items() if v is not None})
    parameters = {name: getattr(counts, name) for name in ("tunable", "activated_mean", "activated_max")}
    seconds = {"total": finished - started, "training": trained_at - started, "evaluation": finished - trained_at}
    return {
        "status": FINISHED,
        "settings": _settings(run),
        **trained,
        "parameters": {**parameters, "trained": trained["parameters"]},
        "tests": scores,
        "expert_shares": shares,
        "hub_revisions": inputs.revisions(run),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "versions": versions(),
        "environment": {k: v for k, v in environment(device).items() if k not in ("seconds", "load_average", "date")},
    }


@cache
def revision() -> str | None:
    """The git revision of the code, with `-dirty` if files differ; `None` outside git. Read once per process."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def training_arguments(settings: Mapping[str, Any], folder: Path, seed: int, *, resume: bool = False) -> Any:
    """The arguments of a run's training. An invalid value raises a [`MiLoraError`]."""
    own = {"output_dir": str(folder), "seed": seed, "resume_from_checkpoint": "last" if resume else None}
    try:
        return TrainingArguments(**{**ALWAYS, **settings, **own})
    except (ValueError, TypeError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise MiLoraError(f"The settings of training are refused: {lines[0]}") from error


def check_training(grid: Grid) -> None:
    """Creates the training arguments of all runs once, so an invalid value raises before the first run."""
    runs = [run for cell in grid.cells for run in (grid.asked(cell, {}), *(run for _, run in grid.tries(cell)))]
    for settings in {canonical(run.training): run.training for run in runs}.values():
        training_arguments(settings, Path("out"), 0)


def _train(run: Run, data: DataArguments, folder: Path) -> Record:
    """Trains unless the folder has a complete adapter. Returns the training's part of the record."""
    path = folder / RESULT_FILE
    is_complete = path.is_file()
    if not is_complete:
        checkpoint = last_checkpoint(folder)
        if checkpoint is None:
            shutil.rmtree(folder, ignore_errors=True)
        arguments = training_arguments(run.training, folder, run.seed, resume=checkpoint is not None)
        settings = {name: value for name, value in run.settings.items() if value is not None}
        if METHODS[run.method].config_class is MiLoraConfig:
            # Use the configuration's default, not the one of `milora train`.
            settings = {"router_norm": "tokens", **settings}
        method = MethodArguments(method=run.method, settings=settings)
        # The trainer prints a line at every log.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            train(data, method, arguments)
    trained = json.loads(path.read_text(encoding="utf-8"))
    result, resumed_from = trained["results"], trained["results"]["resumed_from"]
    step = None if resumed_from is None else int(resumed_from.rpartition("-")[2])
    return {
        "full_training": _full_training(trained["training"]),
        "dev_perplexity": result["dev_perplexity_best"],
        "steps": result["steps"],
        "resumed_from_step": result["steps"] if is_complete else step,
        "epochs": result["epochs"],
        "rows": {"train": result["train_rows"], "dev": result["dev_rows"], "left_out": result["skipped_rows"]},
        "parameters": result["tunable_parameters"],
    }


def _settings(run: Run) -> Record:
    """All fields of milora's own configurations. Defaults may change, so records store the values in use."""
    own = METHODS[run.method].config_class.__module__.startswith("milora")
    return {**(full_settings(run.method, run.settings) if own else {}), **run.settings}


def _full_training(arguments: Record) -> Record:
    """All settings of training except those at TRL's defaults, which follow from the recorded version of TRL."""
    own = TrainingArguments.__annotations__
    defaults = {one.name: one.default for one in fields(SFTConfig)}
    told = {name: value for name, value in arguments.items() if name in own or value != defaults.get(name, ...)}
    return {name: value for name, value in told.items() if name not in PLACES and not isinstance(value, dict | list)}
