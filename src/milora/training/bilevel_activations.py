"""Theta of the paper's equation 7, the adapter's rational activations, trained on dev batches under any trainer."""

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
    """Trains the coefficients of rational activations on dev batches, everything else stays the trainer's.

    In MiLoRA they are the routers'. IAPT's, inside its bottlenecks, are trained alike: at the learning rate that its
    matrices need they are thrown off their shape, and nothing is learned.

    After every `every`-th optimiser step of the trainer, Theta takes one step of Adam's on one dev batch (first-order
    bi-level optimisation, equation 7 of Zhang et al. 2024), at a constant learning rate: one forward and one backward
    pass in which nothing else gets gradients. The pass is in evaluation mode: the loss is the dev loss itself, without
    the load-balancing loss (which belongs to the lower problem, in training), without a trace in the routing
    statistics, and without dropout. Under gradient checkpointing it is checkpointed too; dropout that a block of the
    backbone applies by itself, outside its sub-modules, is then left on.

    `Trainer(model, ..., callbacks=[BilevelActivations(dev_batches)])`; [`milora.training.MiLoraTrainer`] adds one by
    itself, and keeps its state in the checkpoints. A model without such activations is left alone.

    Args:
        dev_batches: Batches of the dev set with labels, as the model takes them. In several processes each has its
            own, and Theta stays the same in all. `None` for those of the `MiLoraTrainer` it is given to.
        every: Optimiser steps of the trainer for one step of Theta.
        learning_rate: Adam's, of Theta.

    Raises:
        MiLoraError: If an argument is out of range; in training if there are no dev batches.
    """

    def __init__(self, dev_batches: Iterable[Batch] | None = None, every: int = 1, learning_rate: float = 1e-6) -> None:
        super().__init__(dev_batches, every, learning_rate)
        self.loss: Tensor | None = None
        """Of the last dev batch."""
        self._theta: list[nn.Parameter] = []

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Keeps Theta out of the trainer's optimiser, which is made later, and out of gradients between processes."""
        self._theta = activation_parameters(model)
        require_gradients(self._theta, False)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Makes Theta's optimiser, or goes on with it."""
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
        """A step of Theta, when it is due."""
        loss = self.step_if_due(model, args, state)
        if loss is not None:
            self.loss = loss

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves Theta as PEFT had it."""
        require_gradients(self._theta, True)


def activation_parameters(model: Any) -> list[nn.Parameter]:
    """Theta: the coefficients of a model's rational activations, as far as they train; empty for most methods.

    In MiLoRA they are the routers' (equation 7 of Zhang et al. 2024), in IAPT those inside the bottlenecks.
    """
    return [
        parameter
        for module in model.modules()
        if isinstance(module, RationalActivation)
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
