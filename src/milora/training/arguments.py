"""The arguments of `milora train`, with the paper's settings as defaults."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.utils import is_torch_xla_available
from trl import SFTConfig

from milora.tasks import registry
from milora.training.ranges import DATA, TRAINING, check_ranges
from milora_core.errors import MiLoraError, did_you_mean

_log = logging.getLogger(__name__)

SMALL_TRAIN_SET = 10_000
"""With fewer rows the paper uses batches of 16, otherwise 128."""

ACTIVATION_TRAINING = ("bilevel", "joint", "frozen")


def multiplies_bf16() -> bool:
    """Whether this processor multiplies bfloat16 matrices natively: AVX-512 BF16 or AMX, and on ARM BF16."""
    # Not in torch before 2.10, where float32 is the safe choice.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@dataclass
class DataArguments:
    """The backbone and the rows."""

    backbone: str = field(
        metadata={
            "help": "A model folder, a hub name, or 'tiny' (bundled).",
            "aliases": ["--model_name_or_path"],
        },
    )
    dtype: str = field(
        default="auto", metadata={"help": "The backbone's dtype; by default as saved, on a CPU float32."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a backbone on the hub."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, flash_attention_2, eager, ..."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Load the backbone in 8 bits (bitsandbytes)."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Load the backbone in 4 bits (QLoRA, bitsandbytes)."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "nf4 or fp4.", "choices": ["fp4", "nf4"]})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantise the quantisation's constants too."})
    bnb_4bit_quant_storage: str | None = field(default=None, metadata={"help": "The storage dtype of 4-bit weights."})
    task: list[str] = field(
        default_factory=list,
        metadata={"help": "Names of tasks, separated by commas or spaces; several are mixed."},
    )
    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "More training rows: a .jsonl or .json file, a folder, a task's name, or a hub data set, "
            "owner/name or owner/name:configuration."
        },
    )
    dev_data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Rows for dev perplexity: a file, or a source with a dev or validation split; by default the "
            "training sources' dev rows, or held-out rows if there are none."
        },
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the benchmarks' files; by default MILORA_DATA_DIR, else the hub."},
    )
    dev_fraction: float = field(
        default=0.1, metadata={"help": "Share held out for dev, at most 500 rows, if the data have no dev split."}
    )
    train_rows: int | None = field(default=None, metadata={"help": "Use only the first rows of each training source."})
    dev_rows: int | None = field(default=None, metadata={"help": "Use only the first rows of each dev source."})

    def __post_init__(self) -> None:
        self.task = [name for part in _listed(self.task) for name in part.replace(",", " ").split()]
        self.data, self.dev_data = _listed(self.data), _listed(self.dev_data)
        check_ranges(vars(self), DATA)
        for name in self.task:
            if name not in registry.names():
                raise MiLoraError(
                    f"There is no task {name!r}; there are {', '.join(registry.names())}"
                    f"{did_you_mean(name, registry.names())} Files are passed as --data."
                )

    @property
    def sources(self) -> list[str]:
        """All sources of training rows, without duplicates."""
        return list(dict.fromkeys([*self.task, *self.data]))


def _listed(value: list[str] | str) -> list[str]:
    """A YAML file may have a single name instead of a list."""
    return [value] if isinstance(value, str) else list(value)


@dataclass
class TrainingArguments(SFTConfig):  # type: ignore[misc]
    """TRL's `SFTConfig`, with the paper's settings (section 4.2 of Zhang et al. 2024) as defaults."""

    output_dir: str | None = field(default="out", metadata={"help": "Folder for the adapter and checkpoints."})
    max_length: int | None = field(
        default=768,
        metadata={"help": "Longer rows are left out and counted; at most the backbone's positions."},
    )
    num_train_epochs: float = field(
        default=10.0, metadata={"help": "Maximum number of epochs; early stopping may end training earlier."}
    )
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows per device and step."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of adapters and routers."})
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Recompute each block in the backward pass instead of saving its activations. Default: on GPUs, "
            "and on a CPU if the activations do not fit into memory."
        },
    )
    activation_learning_rate: float = field(
        default=1e-6, metadata={"help": "Learning rate of the rational activations (Theta)."}
    )
    activation_training: str = field(
        default="bilevel",
        metadata={
            "help": "How the rational activations of MiLoRA's routers and of IAPT train: bilevel (on dev batches, "
            "alternating with everything else), joint (on train batches with everything else) or frozen.",
            "choices": ACTIVATION_TRAINING,
        },
    )
    bilevel_every: int = field(default=1, metadata={"help": "Number of optimiser steps per step on a dev batch."})
    dense_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the steps, from the beginning, in which every prompt trains all experts of MiLoRA; the "
            "others train top_k."
        },
    )
    search_share: float = field(
        default=0.3, metadata={"help": "Share of the steps in which SSP and Learned-Adapter search for a structure."}
    )
    total_train_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows per optimiser step; by default 16 for fewer than 10,000 training rows, else 128."},
    )
    warmup_steps: float = field(default=0.06, metadata={"help": "Warm-up steps, or their share if below 1."})
    eval_strategy: str = field(
        default="steps", metadata={"help": "When to evaluate: steps, epoch or no.", "choices": ("no", "steps", "epoch")}
    )
    eval_steps: float | None = field(default=200, metadata={"help": "Steps between evaluations."})
    eval_on_start: bool = field(
        default=True, metadata={"help": "Also evaluate before the first step, unless eval_strategy is no."}
    )
    save_strategy: str = field(
        default="steps",
        metadata={
            "help": "When to save a checkpoint: steps, epoch, best or no.",
            "choices": ("no", "steps", "epoch", "best"),
        },
    )
    save_steps: float = field(default=200, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "Load the best checkpoint at the end, if there are checkpoints."}
    )
    metric_for_best_model: str | None = field(default="eval_loss", metadata={"help": "Metric that selects it."})
    greater_is_better: bool | None = field(default=False, metadata={"help": "Whether more is better."})
    early_stopping_patience: int = field(
        default=10,
        metadata={"help": "Number of evaluations without improvement after which training ends; 0 disables it."},
    )

    def __post_init__(self) -> None:
        check_ranges(vars(self), TRAINING)
        if self.max_steps == 0:
            raise MiLoraError("max_steps must be at least 1, or -1 for num_train_epochs epochs; found 0.")
        if self.bf16 is None and not self.fp16:  # type: ignore[has-type]
            # TRL would enable bf16 everywhere, which is slower on CPUs without native support.
            has_accelerator = torch.accelerator.is_available() or is_torch_xla_available()
            # transformers accepts bf16 on a CPU only with use_cpu.
            self.use_cpu = self.use_cpu or not has_accelerator  # type: ignore[has-type]
            self.bf16 = multiplies_bf16() if self.use_cpu else torch.cuda.is_available()
        # transformers uses both names.
        asked = (self.gradient_checkpointing, getattr(self, "activation_checkpointing", None))
        self.chooses_checkpointing = asked == (None, None)
        """Whether the caller leaves gradient checkpointing to us: on, until the memory is known to be sufficient."""
        if self.chooses_checkpointing:
            self.gradient_checkpointing = True
        self._choose_evaluations()
        super().__post_init__()
        if self.activation_training not in ACTIVATION_TRAINING:
            raise MiLoraError(
                f"activation_training must be one of {', '.join(ACTIVATION_TRAINING)}; found "
                f"{self.activation_training!r}."
            )
        for name in ("packing", "eval_packing", "padding_free"):
            if getattr(self, name):
                raise MiLoraError(
                    f"{name} puts several prompts into one row, but each row has exactly one route: set it to False."
                )

    def _choose_evaluations(self) -> None:
        """Without evaluations there is none before the first step; without checkpoints there is no best one."""
        evaluates = getattr(self.eval_strategy, "value", self.eval_strategy) != "no"
        saves = getattr(self.save_strategy, "value", self.save_strategy) != "no"
        self.eval_on_start = self.eval_on_start and evaluates
        self.load_best_model_at_end = self.load_best_model_at_end and evaluates and saves

    def without_evaluation(self) -> None:
        """Disables all evaluations, for a run without dev rows."""
        self.eval_strategy = "no"
        self._choose_evaluations()

    def skip_checkpointing(self) -> None:
        """Disables gradient checkpointing under both of its names."""
        self.gradient_checkpointing = False
        if hasattr(self, "activation_checkpointing"):
            self.activation_checkpointing = False

    @property
    def rows_at_once(self) -> int:
        """Rows of one step on all devices of all processes."""
        devices = max(self.world_size, 1) * max(self.n_gpu, 1)
        return int(self.per_device_train_batch_size * devices)

    def set_length(self, positions: int | None) -> None:
        """Lowers `max_length` to the backbone's positions if it has fewer, with a warning."""
        if positions is None or (self.max_length is not None and self.max_length <= positions):
            return
        if self.process_index == 0:
            _log.warning(
                "max_length is %d instead of %s: the backbone has no more positions.", positions, self.max_length
            )
        self.max_length = positions

    def set_accumulation(self, rows: int) -> None:
        """Sets `gradient_accumulation_steps` such that an optimiser step uses the paper's total batch.

        Does nothing if the caller set the accumulation and no total. If the devices cannot form the paper's total, a
        warning gives the actual one.

        Raises:
            MiLoraError: If the total is not a multiple of the rows per step on all devices.
        """
        accumulation: int = self.gradient_accumulation_steps  # type: ignore[has-type]
        if self.total_train_batch_size is None and accumulation > 1:
            return
        total = self.total_train_batch_size or (16 if rows < SMALL_TRAIN_SET else 128)
        at_once = self.rows_at_once
        if self.total_train_batch_size is not None and total % at_once != 0:
            raise MiLoraError(
                f"total_train_batch_size={total} is not a multiple of the {at_once} rows per step "
                "(per_device_train_batch_size x devices)."
            )
        self.gradient_accumulation_steps = max(total // at_once, 1)
        taken = at_once * self.gradient_accumulation_steps
        if taken != total and self.process_index == 0:
            _log.warning(
                "An optimiser step uses %d rows instead of the paper's %d, which is not a multiple of the %d rows per"
                " step: change per_device_train_batch_size, or set total_train_batch_size.",
                taken,
                total,
                at_once,
            )

    def optimizer_steps(self, rows: int) -> int:
        """The number of optimiser steps of a run on this many rows, without early stopping."""
        if self.max_steps > 0:
            return int(self.max_steps)
        batches = rows // self.rows_at_once if self.dataloader_drop_last else math.ceil(rows / self.rows_at_once)
        steps_an_epoch: int = max(math.ceil(batches / self.gradient_accumulation_steps), 1)
        return math.ceil(self.num_train_epochs * steps_an_epoch)
