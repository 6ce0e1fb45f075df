"""One run: trains an adapter, tests it, and says everything that came of it."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig

from milora.backbone.loading import load_adapter, locate
from milora.benchmark.environment import environment
from milora.evaluation.generation import Evaluation, evaluate_task
from milora.evaluation.predictions import read_predictions
from milora.evaluation.routes import expert_shares
from milora.inference.generation import Decoding
from milora.methods import parameter_counts
from milora.paper.materials import Materials
from milora.paper.revision import revision
from milora.paper.runs import Run
from milora.paper.store import FINISHED, Record
from milora.tasks import registry
from milora.training import DataArguments, MethodArguments, TrainingArguments, train
from milora.training.result import versions
from milora.training.run import load_for_training

ALWAYS: Mapping[str, Any] = {"report_to": "none", "disable_tqdm": True, "push_to_hub": False}
"""What a run of a grid has otherwise than a training by itself, unless it is asked for."""

PLACES = ("output_dir", "run_name", "logging_dir", "hub_model_id", "hub_token", "deepspeed", "fsdp_config")
"""Fields of `TrainingArguments` that say where something is, and nothing about what comes out."""

MEASURED_SEPARATELY = ("seconds", "load_average", "date")


def execute(run: Run, folder: Path, materials: Materials) -> Record:
    """Trains and tests.

    Args:
        run: What to do.
        folder: For the adapter and the predictions; emptied before, and taken away when the run has finished.
        materials: Where the rows come from.

    Returns:
        The run's record for the results: its identity, its full settings, versions, revision and environment, and what
        came out.

    Raises:
        Exception: Whatever training or generation raises.
    """
    started = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    arguments = TrainingArguments(output_dir=str(folder), seed=run.seed, **{**ALWAYS, **run.training})
    data = DataArguments(backbone=run.backbone, task=list(run.tasks), data_dir=materials.data_dir, **run.data)
    # The trainer prints a line at every log, in which the grid's own lines would drown.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        result = train(data, MethodArguments(method=run.method, settings=_without_none(run.settings)), arguments)
    trained = time.monotonic()
    # The very backbone that was trained on: its revision, its dtype, its bits.
    model, tokenizer = load_for_training(data, arguments)
    model = load_adapter(model, folder)
    tests, shares = _tested(run, "test", run.evaluation["test_rows"], model, tokenizer, folder, materials)
    dev: dict[str, Any] = {}
    if run.evaluation["dev_rows"]:
        dev, _ = _tested(run, "dev", run.evaluation["dev_rows"], model, tokenizer, folder, materials)
    device = str(model.device)
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    finished = time.monotonic()
    counts = parameter_counts(run.method, materials.config(run.backbone), **_without_none(run.settings))
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "run": run.digest,
        "status": FINISHED,
        "label": run.label,
        "backbone": backbone_name(run.backbone),
        **run.identity,
        "full_training": _settings(arguments),
        "tests": tests,
        "dev": dev,
        "expert_shares": shares,
        "dev_perplexity": result.dev_perplexity_best,
        "steps": result.steps,
        "epochs": result.epochs,
        "rows": {"train": result.train_rows, "dev": result.dev_rows, "left_out": result.skipped_rows},
        "parameters": {
            "tunable": counts.tunable,
            "activated_mean": counts.activated_mean,
            "activated_max": counts.activated_max,
            "trained": result.tunable_parameters,
        },
        "seconds": {
            "total": round(finished - started, 1),
            "training": round(trained - started, 1),
            "evaluation": round(finished - trained, 1),
        },
        "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "revision": revision(),
        "environment": _environment(device),
    }


def backbone_name(backbone: str) -> str:
    """A backbone's name, without where it lies."""
    return Path(backbone).name if Path(locate(backbone)).is_dir() else backbone


def _tested(
    run: Run, split: Any, limit: int | None, model: Any, tokenizer: Any, folder: Path, materials: Materials
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores by task, and where there were routes, the experts' shares by task."""
    scores: dict[str, Any] = {}
    shares: dict[str, Any] = {}
    for name in run.tests if split == "test" else run.tasks:
        task = registry.get(name, materials.data_dir)
        path = folder / "predictions" / f"{name}.{split}.jsonl"
        evaluation = evaluate_task(
            model,
            tokenizer,
            task,
            split=split,
            limit=limit,
            decoding=Decoding(max_new_tokens=task.max_new_tokens, beams=run.evaluation["beams"]),
            batch_size=run.evaluation["batch_size"],
            output=path,
        )
        scores[name] = _score(evaluation)
        routed = [row for row in read_predictions(path) if row.get("route")]
        if routed:
            shares[name] = share_record(routed)
    return scores, shares


def _score(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "accuracy": evaluation.accuracy,
        "rows": evaluation.rows,
        "correct": evaluation.correct,
        "unparsed": evaluation.unparsed,
        "no_room": evaluation.no_room,
    }


def share_record(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The share of prompts that chose each expert in each block, as a record holds it.

    Args:
        rows: Of predictions, all with a route.

    Returns:
        `experts`, `blocks` (their numbers), `share` (blocks x experts), and `prompts`, how many there were.
    """
    shares = expert_shares(rows)
    blocks = sorted(next(iter(shares.values())))
    share = [[round(of_expert[block], 4) for of_expert in shares.values()] for block in blocks]
    return {"experts": list(shares), "blocks": blocks, "share": share, "prompts": len(rows)}


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
