"""Adds an auxiliary loss to a model's output, in the format that the trainer reads."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from milora.tuners.trainers import check_token_weights

NO_LOSS = (
    "The trainer computes its own loss from log-probabilities, so the load-balancing loss is left out. Set "
    "load_balancing_coef=0 to silence this warning."
)


def add_to_loss(output: Any, auxiliary: Tensor, tokens: Tensor, items: Tensor | int | None) -> Any:
    """Adds an auxiliary loss to the output, weighted like the model's loss under gradient accumulation.

    `Trainer` passes the model the number of supervised tokens of all micro-batches, so that their losses add up to the
    mean over tokens. The auxiliary loss is scaled by this batch's share of these tokens. `SFTTrainer` (TRL 1.16 and
    later) requests the log-probability of each supervised token instead and averages them itself. Each log-probability
    is then lowered by the auxiliary loss, which gives the same result. Trainers of preferences or rewards (DPO, GRPO)
    compute another loss from log-probabilities: the auxiliary loss is left out, with a warning.

    Args:
        output: A `ModelOutput`, or a tuple whose first element is the loss.
        auxiliary: A scalar, already multiplied by its coefficient.
        tokens: Supervised tokens of this batch.
        items: Supervised tokens of all accumulated batches; `None` if the loss is the batch's mean.

    Raises:
        MiLoraError: If the trainer weights the losses of tokens, and with them the auxiliary loss.
    """
    weight: Tensor | float = 1.0 if items is None else tokens / items
    if isinstance(output, tuple):
        return (_plus(output[0], auxiliary * weight), *output[1:]) if output else output
    if getattr(output, "loss", None) is not None:
        output["loss"] = _plus(output["loss"], auxiliary * weight)
    if getattr(output, "log_probs", None) is None:
        return output
    # Only supervised fine-tuning requests `is_top1` without `mean_logits`. The log-probabilities that preference tuning
    # and reinforcement learning request are no loss.
    if getattr(output, "is_top1", None) is None or getattr(output, "mean_logits", None) is not None:
        warnings.warn(NO_LOSS, stacklevel=2)
    else:
        check_token_weights()
        mask = output.label_mask.to(output.log_probs.dtype)
        output["log_probs"] = output.log_probs - auxiliary.to(output.log_probs) * mask
    return output


def _plus(loss: Tensor, auxiliary: Tensor) -> Tensor:
    return loss + auxiliary.to(device=loss.device, dtype=loss.dtype)
