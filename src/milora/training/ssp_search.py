"""The search of SSP, under any trainer of transformers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from milora.training.architecture_search import ArchitectureSearch
from milora.training.dev_step import Batch
from milora.tuners.ssp import SSPModel
from milora_core.errors import MiLoraError


class SSPSearch(ArchitectureSearch):
    """Searches for SSP's structure in the first part of a training run; the rest trains what was found, from anew.

    The trainer trains the candidates' weights on train batches, under gates that are drawn for each step; the gates'
    logits learn on dev batches (Hu et al. 2022, section 3.2, first order). When the search ends,
    [`SSPModel.harden`] keeps the most probable candidates that fit the budget, and the optimiser forgets what it knew.
    The learning rate goes on where it was.

    `Trainer(model, ..., callbacks=[SSPSearch(dev_batches)])`. A run that is resumed begins with
    `PeftModel.from_pretrained(backbone, checkpoint, is_trainable=True)`, because a checkpoint has the candidates only
    until the search ends, and afterwards only what was found. The gates' Adam and the dev batches go on
    where they were under a `MiLoraTrainer`, whose checkpoints have them, and begin anew under another.

    Args:
        dev_batches: As for [`ArchitectureSearch`].
        search_share: Share of the training steps in which the search ends.
        every: Trainer's steps for one step of the gates.
        learning_rate: Adam's, of the gates' logits; the default is S3PET's.

    Raises:
        MiLoraError: As [`ArchitectureSearch`].
    """

    tuner_class = SSPModel

    def __init__(
        self,
        dev_batches: Iterable[Batch] | None = None,
        search_share: float = 0.3,
        every: int = 1,
        learning_rate: float = 0.1,
    ) -> None:
        if search_share >= 1:
            raise MiLoraError(f"search_share must be below 1, to leave steps for what was found; found {search_share}.")
        super().__init__(dev_batches, search_share, every, learning_rate)

    def decisive(self, tuner: Any) -> list[nn.Parameter]:
        """The gates' logits."""
        parameters: list[nn.Parameter] = tuner.gate_parameters()
        return parameters

    def advance(self, tuner: Any, step: int, steps: int) -> bool:
        """Hardens the structure at the end, and begins anew with it."""
        if step < steps:
            return False
        tuner.harden()
        return True
