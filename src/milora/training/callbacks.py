"""MiLoRA's values in a trainer's log."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from milora.training.tuner import tuner_of
from milora.tuners.milora import MiLoraModel


def routing_metrics(model: Any) -> dict[str, float]:
    """The routing statistics of a (wrapped) model since the last call; empty for models without routers."""
    tuner = tuner_of(model)
    return tuner.routing_statistics(reset=True) if isinstance(tuner, MiLoraModel) else {}


class RoutingLogger(TrainerCallback):  # type: ignore[misc]
    """Logs the load-balancing loss and each expert's share of the choices in any trainer of transformers.

    `Trainer(..., callbacks=[RoutingLogger()])`. [`milora.training.MiLoraTrainer`] needs none. transformers calls its
    own integrations, such as wandb, before the caller's callbacks; use `MiLoraTrainer` to have the values there too.
    """

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Adds to a training log's values, in place, and to the trainer's history."""
        if logs is None or "loss" not in logs:
            return
        metrics = routing_metrics(kwargs.get("model"))
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)
