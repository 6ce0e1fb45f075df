"""Trains adapters with TRL's `SFTTrainer` and the paper's settings."""

from milora_core.errors import importing

with importing("train", "Training"):
    from milora.training.arguments import DataArguments, TrainingArguments
    from milora.training.bilevel_activations import BilevelActivations
    from milora.training.callbacks import DenseStart, RoutingLogger
    from milora.training.method import MethodArguments
    from milora.training.result import TrainingResult
    from milora.training.trainer import MiLoraTrainer
    from milora.training.training_run import train

__all__ = [
    "BilevelActivations",
    "DataArguments",
    "DenseStart",
    "MethodArguments",
    "MiLoraTrainer",
    "RoutingLogger",
    "TrainingArguments",
    "TrainingResult",
    "train",
]
