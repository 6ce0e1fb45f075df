"""Adds an auxiliary loss to a model's output, in the form that the trainer reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from milora.tuners.trainers import check_token_weights


def add_to_loss(output: Any, auxiliary: Tensor, tokens: Tensor, items: Tensor | int | None) -> Any:
    """The output with an auxiliary loss in it, once, weighted as its own loss is under gradient accumulation.

    `Trainer` gives the model the number of supervised tokens of all micro-batches, so that their losses add up to the
    mean over tokens; the auxiliary loss is then scaled by this batch's share of them. `SFTTrainer` (TRL 1.16 and later)
    asks the model for the log-probability of each supervised token instead and averages these itself: there each of
    them is lowered by the auxiliary loss, which comes to the same.

    Args:
        output: A `ModelOutput`, or a tuple whose first element is the loss.
        auxiliary: A scalar, already multiplied by its coefficient.
        tokens: Supervised tokens of this batch.
        items: Supervised tokens of all batches that are accumulated, `None` where the loss is the batch's mean.

    Raises:
        MiLoraError: If the trainer weighs the losses of tokens, and so the auxiliary loss with them.
    """
    weight: Tensor | float = 1.0 if items is None else tokens / items
    if isinstance(output, tuple):
        return (_plus(output[0], auxiliary * weight), *output[1:]) if output else output
    if getattr(output, "loss", None) is not None:
        output["loss"] = _plus(output["loss"], auxiliary * weight)
    # `is_top1` is what supervised fine-tuning asks for on top; reinforcement learning asks for the log-probabilities of
    # a policy, which are no loss.
    if getattr(output, "log_probs", None) is not None and getattr(output, "is_top1", None) is not None:
        check_token_weights()
        mask = output.label_mask.to(output.log_probs.dtype)
        output["log_probs"] = output.log_probs - auxiliary.to(output.log_probs) * mask
    return output


def _plus(loss: Tensor, auxiliary: Tensor) -> Tensor:
    return loss + auxiliary.to(device=loss.device, dtype=loss.dtype)
