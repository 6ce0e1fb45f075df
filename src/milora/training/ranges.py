"""The valid ranges of a training run's numbers, checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from milora_core.errors import MiLoraError


class Range(NamedTuple):
    """The valid values of a setting.

    Attributes:
        least: Lower bound.
        below: Exclusive upper bound.
        is_open: Whether the lower bound is exclusive.
        is_whole: Whether values are integers.
        words: The range in words, for messages.
    """

    least: float
    words: str
    below: float = math.inf
    is_open: bool = False
    is_whole: bool = False

    def has(self, value: Any) -> bool:
        """Whether a value is a number in this range; booleans, NaN and infinity are not."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        if self.is_whole and value != int(value):
            return False
        return (value > self.least if self.is_open else value >= self.least) and value < self.below


COUNT = Range(1, "at least 1, in whole numbers", is_whole=True)
COUNT_OR_NONE = Range(0, "at least 0, in whole numbers", is_whole=True)
AMOUNT = Range(0.0, "at least 0")
POSITIVE = Range(0.0, "above 0", is_open=True)
SHARE = Range(0.0, "at least 0 and below 1", below=1.0)

TRAINING = {
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "total_train_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "eval_accumulation_steps": COUNT,
    "bilevel_every": COUNT,
    "max_length": COUNT,
    "save_total_limit": COUNT,
    "early_stopping_patience": COUNT_OR_NONE,
    "dataloader_num_workers": COUNT_OR_NONE,
    "seed": COUNT_OR_NONE,
    "data_seed": COUNT_OR_NONE,
    "num_train_epochs": POSITIVE,
    "logging_steps": POSITIVE,
    "eval_steps": POSITIVE,
    "save_steps": POSITIVE,
    "learning_rate": AMOUNT,
    "activation_learning_rate": AMOUNT,
    "weight_decay": AMOUNT,
    "warmup_steps": AMOUNT,
    "max_grad_norm": AMOUNT,
    "adam_epsilon": AMOUNT,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "label_smoothing_factor": SHARE,
    "dense_share": SHARE,
    "search_share": Range(0.0, "above 0 and at most 1", below=math.nextafter(1.0, 2.0), is_open=True),
}
"""Ranges of the fields of [`milora.training.TrainingArguments`]; `None` is always in range."""

DATA = {"dev_fraction": SHARE, "train_rows": COUNT, "dev_rows": COUNT}
"""Ranges of the fields of [`milora.training.DataArguments`]."""


METHOD = {
    "r": COUNT,
    "lora_alpha": COUNT,
    "top_k": COUNT,
    "lora_dropout": SHARE,
    "load_balancing_coef": AMOUNT,
}
"""Ranges of the settings that methods share, of [`milora.training.MethodArguments`]."""


def check_ranges(values: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """Checks the values that have a range.

    Raises:
        MiLoraError: If a value is out of its range, or not a number.
    """
    for name, allowed in ranges.items():
        value = values.get(name)
        if value is not None and not allowed.has(value):
            raise MiLoraError(f"{name} must be {allowed.words}; found {value!r}.")
