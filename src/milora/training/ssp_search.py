"""The search of SSP for any trainer of transformers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from milora.training.architecture_search import ArchitectureSearch
from milora.training.dev_step import Batch
from milora.tuners.ssp import SSPModel
from milora_core.errors import MiLoraError


class SSPSearch(ArchitectureSearch):
    """Searches for SSP's structure in the first part of a training run; the rest trains the found structure from
    scratch.

    The trainer trains the candidates' weights on train batches with gates sampled in each step; the gates' logits train
    on dev batches (Hu et al. 2022, section 3.2, first order). When the search ends, [`SSPModel.harden`] keeps the most
    probable candidates that fit the budget, and the optimiser is reset. The learning rate schedule continues.

    `Trainer(model, ..., callbacks=[SSPSearch(dev_batches)])`. To resume a run, start from
    `PeftModel.from_pretrained(backbone, checkpoint, is_trainable=True)`, because a checkpoint has all candidates during
    the search and only the found structure afterwards. The gates' Adam state and the dev batches continue in a
    `MiLoraTrainer`, whose checkpoints contain them, and restart in other trainers.

    Args:
        dev_batches: See [`ArchitectureSearch`].
        search_share: Share of the training steps after which the search ends.
        every: Number of trainer steps per step of the gates.
        learning_rate: Adam's learning rate for the gates' logits; the default is S3PET's.

    Raises:
        MiLoraError: See [`ArchitectureSearch`].
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
            raise MiLoraError(
                f"search_share must be below 1, because the found structure needs training steps; found {search_share}."
            )
        super().__init__(dev_batches, search_share, every, learning_rate)

    def decisive(self, tuner: Any) -> list[nn.Parameter]:
        """The gates' logits."""
        parameters: list[nn.Parameter] = tuner.gate_parameters()
        return parameters

    def advance(self, tuner: Any, step: int, steps: int) -> bool:
        """Fixes the structure at the end and restarts training with it."""
        if step < steps:
            return False
        tuner.harden()
        return True
