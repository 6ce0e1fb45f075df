"""What `milora train` can be told, with the paper's settings as defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from trl import SFTConfig

from milora.errors import MiLoraError
from milora.tuners.milora import MiLoraConfig

SMALL_TRAIN_SET = 10_000
"""Below this many rows the paper trains with batches of 16, from it on with 128."""


@dataclass
class DataArguments:
    """Which backbone learns from which rows."""

    backbone: str = field(default="tiny", metadata={"help": "A model folder, a hub name, or 'tiny', the bundled one."})
    dtype: str = field(
        default="auto", metadata={"help": "The backbone's dtype; by default as it was saved, on a CPU float32."}
    )
    data: list[str] = field(
        default_factory=list,
        metadata={"help": "Training rows, one or several of: a task's name, a .jsonl or .json file, a hub data set."},
    )
    dev_data: list[str] = field(
        default_factory=list,
        metadata={"help": "Rows for dev perplexity; by default the tasks' own dev splits, or rows held out of `data`."},
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder with the benchmarks' files."})
    dev_fraction: float = field(
        default=0.1, metadata={"help": "Share held out for dev, at most 500 rows, where the data have no dev split."}
    )
    train_rows: int | None = field(default=None, metadata={"help": "Use only the first rows of each training source."})
    dev_rows: int | None = field(default=None, metadata={"help": "Use only the first rows of each dev source."})


@dataclass
class MethodArguments:
    """The adapter: MiLoRA's own settings."""

    r: int = field(default=32, metadata={"help": "Rank of each expert."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Outputs are scaled by this / r; default 2 r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the experts' inputs."})
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Name endings of the experts; by default every linear module of the blocks."}
    )
    use_dora: bool = field(default=False, metadata={"help": "MiDoRA: experts are DoRAs."})
    top_k: int = field(default=3, metadata={"help": "How many experts of a block serve a prompt."})
    pooler: str = field(default="attention", metadata={"help": "attention, mean, max or last."})
    router_activation: list[str] = field(
        default_factory=lambda: ["rational"],
        metadata={"help": "rational, or gelu, relu, silu, tanh, identity; one, or one for each block."},
    )
    gate: str = field(default="hard", metadata={"help": "hard, softmax or renormalized."})
    load_balancing_coef: float = field(default=1e-2, metadata={"help": "Coefficient of the load-balancing loss."})
    normalize_router_input: bool = field(default=False, metadata={"help": "Normalise the pooled vector."})

    def to_config(self) -> MiLoraConfig:
        """The PEFT configuration that these arguments describe."""
        values: dict[str, Any] = dict(vars(self))
        values["target_modules"] = self.target_modules or "all-linear"
        if len(self.router_activation) == 1:
            values["router_activation"] = self.router_activation[0]
        return MiLoraConfig(**values)


@dataclass
class TrainingArguments(SFTConfig):  # type: ignore[misc]
    """TRL's `SFTConfig`, with the paper's settings (section 4.2 of Zhang et al. 2024) as defaults."""

    output_dir: str | None = field(default="out", metadata={"help": "Where the adapter and checkpoints go."})
    max_length: int | None = field(default=768, metadata={"help": "Rows of more tokens are left out, and counted."})
    num_train_epochs: float = field(default=10.0, metadata={"help": "Most epochs; early stopping may end it before."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows a step on a device."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of adapters and routers."})
    activation_learning_rate: float = field(
        default=1e-6, metadata={"help": "Learning rate of the routers' rational activations (Theta)."}
    )
    total_train_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows an optimiser step; by default 16 for fewer than 10,000 training rows, else 128."},
    )
    warmup_steps: float = field(default=0.06, metadata={"help": "Warm-up: steps, or a share of them if below 1."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate."})
    eval_steps: float | None = field(default=200, metadata={"help": "Steps between evaluations."})
    eval_on_start: bool = field(default=True, metadata={"help": "Evaluate before the first step too."})
    save_strategy: str = field(default="steps", metadata={"help": "When to save a checkpoint."})
    save_steps: float = field(default=200, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best dev perplexity."})
    metric_for_best_model: str | None = field(default="eval_loss", metadata={"help": "What is best."})
    greater_is_better: bool | None = field(default=False, metadata={"help": "Whether more of it is better."})
    early_stopping_patience: int = field(
        default=10, metadata={"help": "Evaluations without a better one after which training ends; 0 for never."}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None and not self.fp16:  # type: ignore[has-type]
            # TRL would turn bf16 on everywhere; CPUs without native support are slower with it.
            self.bf16 = torch.cuda.is_available()
        super().__post_init__()
        if self.packing or self.padding_free:
            raise MiLoraError(
                "packing and padding_free put several prompts into one row, and a row has one route; leave both off."
            )

    def set_accumulation(self, rows: int) -> None:
        """Sets `gradient_accumulation_steps` so that an optimiser step sees the total batch of the paper.

        Nothing is changed where the caller has set the accumulation and no total.

        Raises:
            MiLoraError: If the total is no multiple of what the devices take at once.
        """
        accumulation: int = self.gradient_accumulation_steps  # type: ignore[has-type]
        if self.total_train_batch_size is None and accumulation > 1:
            return
        total = self.total_train_batch_size or (16 if rows < SMALL_TRAIN_SET else 128)
        at_once = self.per_device_train_batch_size * max(self.world_size, 1) * max(self.n_gpu, 1)
        if self.total_train_batch_size is not None and total % at_once != 0:
            raise MiLoraError(
                f"total_train_batch_size={total} is no multiple of the {at_once} rows that the devices take at once "
                "(per_device_train_batch_size x devices)."
            )
        self.gradient_accumulation_steps = max(total // at_once, 1)
