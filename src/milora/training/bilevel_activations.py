"""Trains Theta of the paper's equation 7, the adapter's rational activations, on dev batches in any trainer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from milora.training.dev_step import Batch, require_gradients
from milora.training.dev_step_callback import DevStepCallback
from milora_core.errors import MiLoraError
from milora_core.routing import RationalActivation


class BilevelActivations(DevStepCallback):
    """Trains the coefficients of rational activations on dev batches; the trainer trains everything else.

    In MiLoRA these are the routers' activations, in IAPT those inside its bottlenecks: the learning rate of IAPT's
    matrices would destroy their shape, and nothing would be learned.

    After every `every`-th optimiser step of the trainer, Theta makes one step of Adam on one dev batch (first-order
    bi-level optimisation, equation 7 of Zhang et al. 2024), at a constant learning rate: one forward and one backward
    pass in which nothing else gets gradients. The pass runs in evaluation mode: the loss is the dev loss, without the
    load-balancing loss (which belongs to the lower problem) and without dropout, and the routing statistics do not
    count it. Under gradient checkpointing it is checkpointed too; then dropout that a block applies outside its
    sub-modules stays on.

    `Trainer(model, ..., callbacks=[BilevelActivations(dev_batches)])`; [`milora.training.MiLoraTrainer`] adds one
    automatically and keeps its state in the checkpoints. A model without such activations is not changed.

    Args:
        dev_batches: Batches of the dev set with labels, as the model takes them. Each process has its own batches, and
            Theta stays the same in all. `None` uses those of the `MiLoraTrainer` with this callback.
        every: Number of optimiser steps of the trainer per step of Theta.
        learning_rate: Adam's learning rate for Theta.

    Raises:
        MiLoraError: If an argument is out of range; in training, if there are no dev batches.
    """

    def __init__(self, dev_batches: Iterable[Batch] | None = None, every: int = 1, learning_rate: float = 1e-6) -> None:
        super().__init__(dev_batches, every, learning_rate)
        self.loss: Tensor | None = None
        """Loss of the last dev batch."""
        self._theta: list[nn.Parameter] = []

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Excludes Theta from the trainer's optimiser, which is created later, and from gradient reduction between
        processes."""
        self._theta = activation_parameters(model)
        require_gradients(self._theta, False)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Creates or restores Theta's optimiser."""
        self._theta = self._theta or activation_parameters(model)
        require_gradients(self._theta, False)
        if not self._theta:
            return
        if self.dev_batches is None:
            raise MiLoraError(
                "Theta, the rational activations, trains on dev batches (activation_training='bilevel'), and there "
                "are none: pass dev rows, or activation_training='joint' or 'frozen'."
            )
        optimizer = torch.optim.AdamW(self._theta, lr=self.learning_rate, weight_decay=0.0)
        self.begin(self._theta, optimizer, evaluation=True)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Makes a step of Theta when due."""
        loss = self.step_if_due(model, args, state)
        if loss is not None:
            self.loss = loss

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restores PEFT's settings of Theta."""
        require_gradients(self._theta, True)


def activation_parameters(model: Any) -> list[nn.Parameter]:
    """Theta: the trainable coefficients of a model's rational activations; empty for most methods.

    In MiLoRA they are the routers' (equation 7 of Zhang et al. 2024), in IAPT those inside the bottlenecks.
    """
    return [
        parameter
        for module in model.modules()
        if isinstance(module, RationalActivation)
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
