"""TRL's `SFTTrainer` for adapters with routers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer

from milora.training.arguments import TrainingArguments
from milora.training.callbacks import routing_metrics
from milora.tuners.milora import MiLoraModel

CHECKPOINT_FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")
"""What a checkpoint needs to be resumed from; transformers writes `trainer_state.json` last."""


class MiLoraTrainer(SFTTrainer):  # type: ignore[misc]
    """`SFTTrainer` with a learning rate of their own for the rational activations, and the routing in its log.

    The activations' coefficients (Theta of the paper's equation 7) form their own parameter group, at
    `TrainingArguments.activation_learning_rate`. Logs carry `load_balancing_loss`, `expert_share/{expert}` and
    `eval_perplexity`.
    """

    args: TrainingArguments

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As `Trainer`'s, with Theta in a group of its own and without weight decay."""
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        tuner = getattr(self.accelerator.unwrap_model(self.model), "base_model", None)
        theta = tuner.activation_parameters() if isinstance(tuner, MiLoraModel) else []
        if is_new and theta:
            own = {id(parameter) for parameter in theta}
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            rate = self.args.activation_learning_rate
            optimizer.add_param_group({"params": theta, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer`'s, with the routing statistics in training logs and the perplexity in evaluation logs."""
        if "loss" in logs:
            logs.update(routing_metrics(self.accelerator.unwrap_model(self.model)))
        if "eval_loss" in logs:
            logs["eval_perplexity"] = math.exp(min(logs["eval_loss"], 700.0))
        super().log(logs, start_time)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder; one whose writing was cut off is passed over."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if all((path / name).is_file() for name in CHECKPOINT_FILES) and _is_json(path / "trainer_state.json"):
            return path
    return None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        return False
    return True
