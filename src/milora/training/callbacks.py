"""Callbacks for MiLoRA adapters in any trainer of transformers: routing in the log, and dense-to-sparse training."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from milora.training.ranges import TRAINING, check_ranges
from milora.training.tuner import tuner_of
from milora.tuners.milora import MiLoraModel
from milora_core.errors import MiLoraError


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


class DenseStart(TrainerCallback):  # type: ignore[misc]
    """Trains all experts of a MiLoRA adapter in the first steps (dense-to-sparse training).

    `Trainer(..., callbacks=[DenseStart(0.25)])`. In these steps every prompt chooses all experts of a block, as in
    LoRA, so each expert learns from every row. In the other steps, and in every evaluation, it chooses `top_k`. The
    adapter and its cost per token are the same as without.

    Mixtures of experts are trained in this way in EvoMoE (Nie et al. 2021, arXiv 2112.14397); MiLoRA's paper does not.

    Args:
        dense_share: Share of the steps, at least 0 and below 1.

    Raises:
        MiLoraError: If the share is out of range; when training begins, if the model has no MiLoRA adapter.
    """

    def __init__(self, dense_share: float) -> None:
        check_ranges({"dense_share": dense_share}, TRAINING)
        self.dense_share = dense_share
        self._steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Computes the number of steps."""
        if not isinstance(tuner_of(model), MiLoraModel):
            raise MiLoraError("dense_share trains all experts of a MiLoRA adapter, and the model has none.")
        self._steps = round(self.dense_share * state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Selects the experts of this step."""
        tuner_of(model).train_all_experts(self.is_open(model, state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Restores `top_k`, also if training ends early."""
        tuner_of(model).train_all_experts(False)

    def is_open(self, model: Any, step: int) -> bool:
        """See [`milora.training.stopping.OpenStructure`]."""
        return step < self._steps
