"""Checks the trainer that calls a model: whether it removes the labels or packs rows.

A router reads the prompt, and in training the labels show where the prompt ends. `Trainer` removes the labels from the
model's arguments for label smoothing and for a `compute_loss_func`, and packed rows look like other rows. The model's
arguments show neither case, so these checks look for the trainer in the call stack.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

from milora_core.errors import MiLoraError

TRAINING_STEP, PREDICTION_STEP = "training_step", "prediction_step"
"""The methods in which transformers' `Trainer` and all TRL trainers call their model."""

WITHHELD = (
    "{trainer} calls the model without labels{because}, so completions would count as part of the prompt and the "
    "load-balancing loss would be lost. Leave out label_smoothing_factor, compute_loss_func and compute_metrics, or "
    "call the model with labels or in `with model.use_prompt(mask):` in your own compute_loss."
)
TRAINER_PACKS = (
    "{trainer} packs several prompts into one row ({setting}=True), but each row has exactly one route: pass "
    "{setting}=False."
)
TRAINER_WEIGHS = (
    "{trainer} with loss_type='dft' weights each token by its probability, and the load-balancing loss too: set "
    "load_balancing_coef=0, or loss_type='nll'."
)


def check_token_weights() -> None:
    """Refuses a trainer that weights the losses of tokens, because each includes the load-balancing loss.

    Raises:
        MiLoraError: If the trainer of this pass weights them.
    """
    for frame in _trainer_frames():
        trainer = frame.f_locals["self"]
        if getattr(trainer.args, "loss_type", None) == "dft":
            raise MiLoraError(TRAINER_WEIGHS.format(trainer=type(trainer).__name__))


def check_calling_trainer(*, has_labels: bool) -> None:
    """Refuses a trainer's forward pass in which the ends of the prompts are unknown.

    Passes outside a trainer are never refused. Passes of a trainer's callbacks or of `generate`, which have no labels,
    are not refused either.

    Args:
        has_labels: Whether the model was called with labels.

    Raises:
        MiLoraError: If a trainer calls the model without its labels, or packs rows.
    """
    for frame in _trainer_frames():
        trainer = frame.f_locals["self"]
        is_training = frame.f_code.co_name == TRAINING_STEP
        if has_labels:
            _refuse_packing(trainer, is_training=is_training)
        elif is_training or _batch_has_labels(frame, trainer):
            raise MiLoraError(WITHHELD.format(trainer=type(trainer).__name__, because=_because(trainer)))


def _trainer_frames() -> Iterator[FrameType]:
    """The running steps of trainers, innermost first."""
    module = sys.modules.get("transformers.trainer")
    frame: FrameType | None = sys._getframe() if module is not None else None
    while frame is not None:
        if frame.f_code.co_name in (TRAINING_STEP, PREDICTION_STEP) and isinstance(
            frame.f_locals.get("self"),
            module.Trainer,  # type: ignore[union-attr]
        ):
            yield frame
        frame = frame.f_back


def _batch_has_labels(frame: FrameType, trainer: Any) -> bool:
    """Whether the batch of a prediction step has labels: `predict` also accepts rows without labels."""
    inputs = frame.f_locals.get("inputs")
    # `Trainer` sets its variable `has_labels` before it removes the labels.
    return (isinstance(inputs, Mapping) and inputs.get("labels") is not None) or bool(frame.f_locals.get("has_labels"))


def _refuse_packing(trainer: Any, *, is_training: bool) -> None:
    arguments = trainer.args
    if (getattr(arguments, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"):
        return
    setting = "packing"
    if not is_training and getattr(arguments, "eval_packing", None) is not None:
        setting = "eval_packing"
    if getattr(arguments, setting, False):
        raise MiLoraError(TRAINER_PACKS.format(trainer=type(trainer).__name__, setting=setting))


def _because(trainer: Any) -> str:
    if getattr(trainer, "compute_loss_func", None) is not None:
        return " (compute_loss_func)"
    if getattr(trainer, "label_smoother", None) is not None:
        return " (label_smoothing_factor)"
    return ""
