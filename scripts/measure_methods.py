#!/usr/bin/env python
"""Trains every method on the bundled tasks and measures it: the table in docs/methods.md.

The same backbone, rows, steps and evaluation for all; learning rates are each method's own, as the methods differ by
orders of magnitude in how far a step moves the output. Results are appended to a JSON lines file as they come, and
methods that are in it already are not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from transformers import set_seed

from milora.backbone.loading import load_backbone
from milora.evaluation.generation import evaluate_task
from milora.inference.generation import Decoding
from milora.methods import METHODS, config_for
from milora.tasks.bundled import BUNDLED_TASKS
from milora.tasks.rows import Row
from milora.tasks.sources import to_dataset
from milora.training import MiLoraTrainer, TrainingArguments
from milora.training.adalora import AdaLoraAllocation
from milora.training.learned_adapter_search import LearnedAdapterSearch
from milora.training.ssp_search import SSPSearch

LEARNING_RATES = {"p-tuning-v2": 3e-2, "iapt": 1e-2, "bitfit": 1e-2, "ia3": 1e-2}
USUAL_LEARNING_RATE = 3e-3


def measure(
    name: str, rate: float, steps: int, batch_size: int, test_rows: int, seed: int, folder: Path
) -> dict[str, Any]:
    """Trains one method and returns its test accuracies."""
    set_seed(seed)
    backbone, tokenizer = load_backbone("tiny", dtype="float32", device="cpu")
    overrides = {"total_step": steps} if name == "adalora" else {}
    model = get_peft_model(backbone, config_for(name, backbone, **overrides))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        total_train_batch_size=batch_size,
        learning_rate=rate,
        activation_training="joint",
        activation_learning_rate=rate / 100,
        gradient_checkpointing=False,
        eval_strategy="no",
        eval_on_start=False,
        load_best_model_at_end=False,
        save_strategy="no",
        logging_steps=50,
        report_to="none",
        use_cpu=True,
        seed=seed,
    )
    each = -(-steps * batch_size // len(BUNDLED_TASKS))
    rows = {split: _rows(split, count, seed) for split, count in (("train", each), ("dev", 4 * batch_size))}
    dev_trainer = MiLoraTrainer(model, arguments, train_dataset=to_dataset(rows["dev"]), processing_class=tokenizer)
    dev_batches = list(dev_trainer.get_train_dataloader()) if name in ("learned-adapter", "ssp") else []
    callbacks = {
        "adalora": [AdaLoraAllocation()],
        "learned-adapter": [LearnedAdapterSearch(dev_batches)],
        "ssp": [SSPSearch(dev_batches)],
    }.get(name, [])
    started = time.monotonic()
    MiLoraTrainer(
        model, arguments, train_dataset=to_dataset(rows["train"]), processing_class=tokenizer, callbacks=callbacks
    ).train()
    seconds = time.monotonic() - started
    return {
        "method": name,
        "learning_rate": rate,
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
        "test_rows": test_rows,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "training_seconds": round(seconds, 1),
        "accuracy": _accuracy(model, tokenizer, test_rows, seed),
    }


def _rows(split: Any, count: int, seed: int) -> list[Row]:
    return [
        Row(example.prompt, example.completion, example.answer)
        for task in BUNDLED_TASKS.values()
        for example in task.examples(split, count, seed)
    ]


def _accuracy(model: PeftModel, tokenizer: Any, test_rows: int, seed: int) -> dict[str, float]:
    return {
        name: evaluate_task(
            model,
            tokenizer,
            task,
            limit=test_rows,
            seed=seed,
            decoding=Decoding(task.max_new_tokens, beams=1),
            batch_size=test_rows,
        ).accuracy
        for name, task in BUNDLED_TASKS.items()
    }


def main() -> None:
    """Measures the methods that the results do not hold yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--test-rows", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, help="instead of each method's own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("out/methods.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    done = {}
    if arguments.results.exists():
        done = {row["method"]: row for row in map(json.loads, arguments.results.read_text().splitlines())}
    for name in arguments.methods:
        if name not in done:
            size = arguments.steps, arguments.batch_size, arguments.test_rows, arguments.seed
            rate = arguments.learning_rate or LEARNING_RATES.get(name, USUAL_LEARNING_RATE)
            done[name] = measure(name, rate, *size, arguments.results.parent / "checkpoints")
            with arguments.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[name]) + "\n")
    console = Console(width=200)
    console.print(
        "| method | learning rate |" + "|".join(f" {t.removeprefix('bundled-')} " for t in BUNDLED_TASKS) + "|"
    )
    console.print("|---|---|" + "---|" * len(BUNDLED_TASKS))
    for name in arguments.methods:
        cells = " | ".join(f"{done[name]['accuracy'][task]:.0%}" for task in BUNDLED_TASKS)
        console.print(f"| `{name}` | {done[name]['learning_rate']:g} | {cells} |")


if __name__ == "__main__":
    main()
