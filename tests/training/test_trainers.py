"""The stock `Trainer` and TRL's `SFTTrainer`: the balance loss is added once, logged, resumed, in two processes too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from support.adapted import adapted as adapted_with_reference
from support.architectures import random_prompts
from support.tokenizer import character_tokenizer
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from milora import MiLoraConfig
from milora.training import MiLoraTrainer, RoutingLogger
from milora.training import TrainingArguments as MiLoraTrainingArguments

QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "save_strategy": "no"}


def adapted(family: str, **settings: Any) -> PeftModel:
    return adapted_with_reference(family, **settings).model


def tokenized_rows(count: int = 8) -> Dataset:
    """Rows of equal length, which need no padding: six prompt tokens, three supervised ones."""
    rows = random_prompts(count, 9, seed=5)
    return Dataset.from_dict(
        {
            "input_ids": rows,
            "attention_mask": [[1] * 9 for _ in rows],
            "labels": [[-100] * 6 + row[6:] for row in rows],
        }
    )


def first_loss(trainer: Trainer) -> float:
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def stock_trainer(model: PeftModel, folder: Path, **settings: Any) -> Trainer:
    arguments = TrainingArguments(str(folder), max_steps=1, **{**QUIET, **settings})
    return Trainer(model, arguments, train_dataset=tokenized_rows(), callbacks=[RoutingLogger()])


@pytest.mark.parametrize("accumulation", [1, 4])
def test_stock_trainer_counts_the_balance_loss_once(tmp_path: Path, accumulation: int) -> None:
    losses = {}
    for coefficient in (0.0, 0.5):
        model = adapted("llama", load_balancing_coef=coefficient)
        trainer = stock_trainer(
            model,
            tmp_path,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            learning_rate=0.0,
        )
        trainer.train()
        losses[coefficient] = first_loss(trainer)
        logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    # The mean over micro-batches, for every kind of loss accumulation.
    assert losses[0.5] - losses[0.0] == pytest.approx(0.5 * logged["load_balancing_loss"], abs=2e-4)
    shares = [value for name, value in logged.items() if name.startswith("expert_share/")]
    assert len(shares) == 7
    assert sum(shares) == pytest.approx(1.0)


def text_rows(count: int = 8) -> Dataset:
    letters = "abcdefgh"
    prompts = [f"say {letters[i % 8]} and {letters[(3 * i) % 8]}:" for i in range(count)]
    return Dataset.from_dict({"prompt": prompts, "completion": [f" {letters[i % 8]}" for i in range(count)]})


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_trainer_counts_the_balance_loss_once(tmp_path: Path, accumulation: int, checkpointing: bool) -> None:
    losses = {}
    for coefficient in (0.0, 0.5):
        model = adapted("llama", load_balancing_coef=coefficient)
        arguments = SFTConfig(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            gradient_checkpointing=checkpointing,
            learning_rate=0.0,
            bf16=False,
            **QUIET,
        )
        trainer = SFTTrainer(
            model,
            arguments,
            train_dataset=text_rows(),
            processing_class=character_tokenizer(),
            callbacks=[RoutingLogger()],
        )
        trainer.train()
        losses[coefficient] = first_loss(trainer)
        logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert losses[0.5] - losses[0.0] == pytest.approx(0.5 * logged["load_balancing_loss"], abs=2e-4)
    assert sum(value for name, value in logged.items() if name.startswith("expert_share/")) == pytest.approx(1.0)


def test_sft_trainer_routes_on_the_prompt_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from milora.tuners import prompt

    prompts = []
    original = prompt.prompt_tokens
    monkeypatch.setattr(prompt, "prompt_tokens", lambda *a, **k: prompts.append(original(*a, **k)) or prompts[-1])
    tokenizer = character_tokenizer()
    arguments = SFTConfig(str(tmp_path), max_steps=1, per_device_train_batch_size=8, bf16=False, **QUIET)
    SFTTrainer(adapted("llama"), arguments, train_dataset=text_rows(), processing_class=tokenizer).train()
    lengths = sorted(len(tokenizer(prompt)["input_ids"]) for prompt in text_rows()["prompt"])
    assert sorted(prompts[0].sum(dim=1).tolist()) == lengths


def test_packing_is_refused_by_a_stock_sft_trainer(tmp_path: Path) -> None:
    arguments = SFTConfig(
        str(tmp_path), max_steps=1, packing=True, max_length=64, bf16=False, per_device_train_batch_size=1, **QUIET
    )
    trainer = SFTTrainer(adapted("llama"), arguments, train_dataset=text_rows(), processing_class=character_tokenizer())
    with pytest.raises(ValueError, match="packed into one row"):
        trainer.train()


def test_the_activations_have_their_own_learning_rate(tmp_path: Path) -> None:
    arguments = MiLoraTrainingArguments(
        str(tmp_path),
        max_steps=1,
        learning_rate=1e-2,
        activation_training="joint",
        activation_learning_rate=1e-5,
        warmup_steps=0,
        eval_strategy="no",
        load_best_model_at_end=False,
        eval_on_start=False,
        **QUIET,
    )
    model = adapted("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    MiLoraTrainer(model, arguments, train_dataset=text_rows(), processing_class=character_tokenizer()).train()
    # AdamW's first step moves every element with a gradient by the learning rate.
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            moved = (parameter - before[name]).abs().max().item()
            limit = 1e-5 if "activation" in name else 1.2e-2
            assert moved <= limit * 1.05, name
    assert any((p - before[n]).abs().max() > 5e-6 for n, p in model.named_parameters() if "activation" in n)


TWO_PROCESSES = """
import json, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_trainers import adapted, stock_trainer
from support.adapted import adapted as adapted_with_reference
model = adapted("llama", load_balancing_coef=0.0, top_k=1)
trainer = stock_trainer(model, Path(sys.argv[1]), per_device_train_batch_size=4 // int(sys.argv[3]), learning_rate=1e-2,
    max_grad_norm=0.0, optim="sgd", lr_scheduler_type="constant", ddp_find_unused_parameters=False)
trainer.args.max_steps = 2
trainer.train()
if trainer.args.process_index == 0:
    torch.save({n: p for n, p in model.named_parameters() if p.requires_grad}, Path(sys.argv[1]) / "out.pt")
"""


@pytest.mark.slow
def test_two_processes_train_and_agree_with_one(tmp_path: Path) -> None:
    """Under DDP without `find_unused_parameters`, which stalls on a parameter without a gradient.

    Without the balance loss: each process computes it over its own rows, so it differs from that of all rows.
    """
    results = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        script = folder / "script.py"
        script.write_text(TWO_PROCESSES)
        here = Path(__file__).parent
        environment = {**os.environ, "PYTHONPATH": str(here.parent)}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        port = ["--master_port", str(29500 + os.getpid() % 1000 + processes)]
        command = [*launcher, *port, str(script), str(folder), str(here), str(processes)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        results[processes] = torch.load(folder / "out.pt")
    start = {n: p for n, p in adapted("llama", top_k=1).named_parameters() if p.requires_grad}
    for name, one in results[1].items():
        torch.testing.assert_close(results[2][name], one, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert any((results[2][name] - start[name]).abs().max() > 1e-4 for name in start)


def test_a_configuration_survives_its_file(tmp_path: Path) -> None:
    adapted("llama", pooler="max", gate="softmax").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    again = MiLoraConfig.from_pretrained(str(tmp_path))
    assert (written["pooler"], again.pooler, again.gate, again.lora_alpha) == ("max", "max", "softmax", 8)
