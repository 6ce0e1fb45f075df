"""The settings of a run's training: those that a report may set, and the arguments that they come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from milora.training import TrainingArguments
from milora_core.errors import MiLoraError

ALWAYS: Mapping[str, Any] = {"report_to": "none", "disable_tqdm": True, "push_to_hub": False}
"""What a run of a grid has otherwise than a training by itself, unless it is asked for."""

OWN = ("output_dir", "seed", "resume_from_checkpoint")
"""Fields of `TrainingArguments` that are a run's own."""

OF_THE_MACHINE = ("bf16", "bf16_full_eval", "fp16", "fp16_full_eval", "tf32", "deepspeed", "fsdp", "fsdp_config")
"""Fields that are refused on one machine and taken on another."""


def training_fields() -> set[str]:
    """The fields of `TrainingArguments` that a report may set."""
    return {one.name for one in fields(TrainingArguments)} - set(OWN)


def training_arguments(settings: Mapping[str, Any], folder: Path, seed: int, *, resume: bool = False) -> Any:
    """The arguments of a run's training.

    Args:
        settings: Fields that differ from the paper's settings.
        folder: For the adapter and its checkpoints.
        seed: Of the adapter's start and of the order of the rows.
        resume: Whether to go on from the last checkpoint in the folder.

    Raises:
        MiLoraError: If the values are refused.
    """
    own = {"output_dir": str(folder), "seed": seed, "resume_from_checkpoint": "last" if resume else None}
    try:
        return TrainingArguments(**{**ALWAYS, **settings, **own})
    except (ValueError, TypeError, ImportError) as error:
        raise MiLoraError(f"The settings of training are refused: {_first_line(error)}") from error


def check_training(settings: Mapping[str, Any], *, here: bool) -> None:
    """Makes the arguments once, so that what is refused shows before the first run and not in each of them.

    Args:
        settings: As of [`training_arguments`].
        here: Whether the runs are to be made on this machine. If not, what only a machine can refuse is passed over: a
            plan or a report of a GPU's runs can be made anywhere.

    Raises:
        MiLoraError: If the values are refused.
    """
    kept = {name: value for name, value in settings.items() if here or name not in OF_THE_MACHINE}
    training_arguments(kept, Path("out"), 0)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
