"""Training adapters: TRL's `SFTTrainer` with the paper's settings."""

from milora.training.arguments import DataArguments, TrainingArguments
from milora.training.callbacks import RoutingLogger
from milora.training.method import MethodArguments
from milora.training.run import TrainingResult, train
from milora.training.trainer import MiLoraTrainer

__all__ = [
    "DataArguments",
    "MethodArguments",
    "MiLoraTrainer",
    "RoutingLogger",
    "TrainingArguments",
    "TrainingResult",
    "train",
]
