"""Trains an adapter from start to end: rows in, the best checkpoint's adapter out."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import EarlyStoppingCallback, set_seed

from milora.backbone.loading import load_backbone
from milora.errors import MiLoraError
from milora.tasks import registry
from milora.tasks.rows import Row
from milora.tasks.sources import read_rows, to_dataset
from milora.training.arguments import DataArguments, MethodArguments, TrainingArguments
from milora.training.trainer import MiLoraTrainer, last_checkpoint

LARGEST_DEV = 500


@dataclass(frozen=True)
class TrainingResult:
    """What a training run came to; `skipped_rows` had more tokens than `max_length`."""

    output: str
    train_rows: int
    dev_rows: int
    skipped_rows: int
    steps: int
    seconds: float
    tunable_parameters: int
    dev_perplexity_before: float | None
    dev_perplexity_best: float | None
    resumed_from: str | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def train(data: DataArguments, method: MethodArguments, arguments: TrainingArguments) -> TrainingResult:
    """Fine-tunes an adapter and writes it to `arguments.output_dir`.

    Raises:
        MiLoraError: If there is nothing to learn from, no row fits `max_length`, or an argument is out of range.
    """
    started = time.monotonic()
    if not data.data:
        raise MiLoraError("There is nothing to learn from: pass --data with a file or a task's name.")
    config = method.to_config()
    output = Path(arguments.output_dir or "out")
    set_seed(arguments.seed)
    train_rows, dev_rows = _read(data, arguments.seed)
    # Adapters train in float32 wherever it is not much slower; a bf16 backbone on a CPU is slower than a float32 one.
    on_cpu = data.dtype == "auto" and (arguments.use_cpu or not torch.cuda.is_available())
    model, tokenizer = load_backbone(
        data.backbone, dtype="float32" if on_cpu else data.dtype, device="cpu" if arguments.use_cpu else None
    )
    train_rows, skipped_train = _fitting(train_rows, tokenizer, arguments.max_length)
    dev_rows, skipped_dev = _fitting(dev_rows, tokenizer, arguments.max_length)
    if not train_rows:
        raise MiLoraError(
            f"None of the {skipped_train} training rows fits max_length={arguments.max_length}; raise --max_length."
        )
    if not dev_rows:
        arguments.eval_strategy = "no"
        arguments.load_best_model_at_end = arguments.eval_on_start = False
    arguments.set_accumulation(len(train_rows))
    # Seeded again: reading and filtering may have drawn numbers, and the adapter's start should not depend on them.
    set_seed(arguments.seed)
    model.config.use_cache = False
    model = get_peft_model(model, config)
    patience = arguments.early_stopping_patience
    trainer = MiLoraTrainer(
        model,
        args=arguments,
        train_dataset=to_dataset(train_rows),
        eval_dataset=to_dataset(dev_rows) if dev_rows else None,
        processing_class=tokenizer,
        callbacks=[EarlyStoppingCallback(patience)] if patience > 0 and dev_rows else [],
    )
    checkpoint = _checkpoint(arguments.resume_from_checkpoint, output)
    if checkpoint is not None:
        # The first evaluation was made by the run that is resumed.
        trainer.args.eval_on_start = False
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model(str(output))
    trainer.state.save_to_json(str(output / "trainer_state.json"))
    perplexities = [entry["eval_perplexity"] for entry in trainer.state.log_history if "eval_perplexity" in entry]
    return TrainingResult(
        output=str(output),
        train_rows=len(train_rows),
        dev_rows=len(dev_rows),
        skipped_rows=skipped_train + skipped_dev,
        steps=trainer.state.global_step,
        seconds=round(time.monotonic() - started, 1),
        tunable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        dev_perplexity_before=perplexities[0] if perplexities else None,
        dev_perplexity_best=min(perplexities, default=None),
        resumed_from=None if checkpoint is None else str(checkpoint),
    )


def _read(data: DataArguments, seed: int) -> tuple[list[Row], list[Row]]:
    train_rows: list[Row] = []
    dev_rows: list[Row] = []
    for source in data.data:
        rows = read_rows(source, "train", data.data_dir)
        if not data.dev_data:
            if source in registry.names():
                dev_rows += read_rows(source, "dev", data.data_dir)[: data.dev_rows]
            else:
                rows, held_out = _hold_out(rows, data.dev_fraction, seed)
                dev_rows += held_out[: data.dev_rows]
        train_rows += rows[: data.train_rows]
    for source in data.dev_data:
        split = "dev" if source in registry.names() else None
        dev_rows += read_rows(source, split, data.data_dir)[: data.dev_rows]
    return train_rows, dev_rows


def _hold_out(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Splits rows at random into train and dev; the order within each stays."""
    if not 0 <= fraction < 1:
        raise MiLoraError(f"dev_fraction must be at least 0 and below 1; found {fraction}.")
    count = min(int(len(rows) * fraction), LARGEST_DEV)
    held_out = set(random.Random(seed).sample(range(len(rows)), count))
    return (
        [row for index, row in enumerate(rows) if index not in held_out],
        [row for index, row in enumerate(rows) if index in held_out],
    )


def _fitting(rows: list[Row], tokenizer: Any, max_length: int | None) -> tuple[list[Row], int]:
    """The rows whose prompt and completion, with the end of sequence, fit; and how many do not."""
    if max_length is None:
        return rows, 0
    fitting = [row for row in rows if _length(row, tokenizer) <= max_length]
    return fitting, len(rows) - len(fitting)


def _length(row: Row, tokenizer: Any) -> int:
    if isinstance(row.prompt, str) and isinstance(row.completion, str):
        return len(tokenizer(row.prompt + row.completion)["input_ids"]) + 1
    messages = [*row.prompt, *row.completion]
    return len(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])


def _checkpoint(resume: str | bool | None, output: Path) -> Path | None:
    if resume is None or str(resume).lower() in ("", "false"):
        return None
    if str(resume).lower() in ("true", "last", "latest"):
        return last_checkpoint(output)
    path = Path(str(resume))
    if not path.is_dir():
        raise MiLoraError(f"No checkpoint at {path}; --resume_from_checkpoint last takes the newest in {output}.")
    return path
