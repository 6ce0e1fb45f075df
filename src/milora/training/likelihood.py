"""The dev loss: the mean negative log-likelihood of all supervised tokens, independent of the training loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from milora.training.tuner import reads_prompts, tuner_of
from milora.tuners.milora import MiLoraModel
from milora_core.errors import MiLoraError


class LikelihoodSum:
    """The sum of the negative log-likelihood of an evaluation and its number of supervised tokens."""

    def __init__(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Adds rows.

        Args:
            rows: (rows, 2): the negative log-likelihood of each row, in nats, and its number of supervised tokens.
        """
        self._sums += rows.to("cpu", torch.float64).sum(dim=0)

    def mean(self) -> float | None:
        """Nats per supervised token, over all rows; `None` without a supervised token."""
        total, tokens = self._sums.tolist()
        return total / tokens if tokens else None


def row_likelihoods(output: Any) -> Tensor:
    """(rows, 2), float32, as [`LikelihoodSum.add`] takes it, of the output of a fused language-model head of TRL's."""
    return torch.stack([-output.log_probs.float().sum(dim=1), output.label_mask.float().sum(dim=1)], dim=1)


@contextmanager
def plain_likelihood(trainer: Any) -> Iterator[None]:
    """Inside this context an `SFTTrainer` computes only the negative log-likelihood."""
    arguments = trainer.args
    loss_type, smoother, own, balances = (
        arguments.loss_type,
        trainer.label_smoother,
        trainer.compute_loss_func,
        trainer.aux_loss_enabled,
    )
    arguments.loss_type, trainer.aux_loss_enabled = "nll", False
    trainer.label_smoother = trainer.compute_loss_func = None
    try:
        yield
    finally:
        arguments.loss_type, trainer.aux_loss_enabled = loss_type, balances
        trainer.label_smoother, trainer.compute_loss_func = smoother, own


def check_loss(trainer: Any, model: Any) -> None:
    """Refuses losses that do not work with routes.

    Raises:
        MiLoraError: For a loss that `Trainer` computes from logits, because it removes the labels, which say where the
            prompt ends; for a loss that weights tokens, if there is a load-balancing loss, which would be weighted with
            them.
    """
    tuner = tuner_of(model)
    if not reads_prompts(tuner):
        return
    for name, value in (
        ("label_smoothing_factor", trainer.args.label_smoothing_factor),
        ("compute_loss_func", trainer.compute_loss_func),
    ):
        if value:
            raise MiLoraError(
                f"{name} makes the trainer remove the labels, from which the model reads where the prompt ends: leave "
                f"{name} out."
            )
    balances = isinstance(tuner, MiLoraModel) and any(
        tuner.peft_config[name].load_balancing_coef > 0 for name in tuner.active_adapters
    )
    if trainer.args.loss_type == "dft" and balances:
        raise MiLoraError(
            "loss_type=dft weights each token by its probability, and the load-balancing loss too: set "
            "load_balancing_coef=0, or loss_type=nll."
        )
