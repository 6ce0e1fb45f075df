"""Dense-to-sparse training: which experts a step trains, that it then equals LoRA, resuming, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from support.adapted import adapted, tensors_for
from support.architectures import ARCHITECTURES, EXPERTS, random_prompts
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from milora import MiLoraError
from milora.training import DenseStart
from milora.training import TrainingArguments as MiLoraTrainingArguments
from milora.training.method_callbacks import method_callbacks
from milora.training.stopping import EarlyStopping
from milora.tuners.milora.router import routers_of

EXPERT_COUNT = len(EXPERTS["llama"])


def rows() -> Dataset:
    prompts = random_prompts(16, 9, seed=5)
    labels = [[-100] * 6 + row[6:] for row in prompts]
    return Dataset.from_dict({"input_ids": prompts, "attention_mask": [[1] * 9] * 16, "labels": labels})


class Snapshots(TrainerCallback):  # type: ignore[misc]
    """The LoRA weights after each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        named = model.named_parameters()
        self.weights.append({name: weight.detach().clone() for name, weight in named if ".lora_" in name})


def train(
    model: PeftModel, folder: Path, *callbacks: TrainerCallback, resume: str | None = None, **settings: Any
) -> None:
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
    }
    arguments = TrainingArguments(str(folder), **{**defaults, **settings})
    trainer = Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows(), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)


def record_choices(model: PeftModel) -> list[tuple[bool, int]]:
    """Of each pass, whether it was in training mode and how many experts each prompt chose in the first block."""
    router = next(iter(routers_of(model).values()))
    decide, found = router.decide, []

    def recording(*args: Any) -> Any:
        decision = decide(*args)
        (count,) = set(decision.chosen.sum(dim=1).tolist())
        found.append((router.training, count))
        return decision

    router.decide = recording  # type: ignore[method-assign, assignment]
    return found


def test_the_first_steps_train_all_experts_and_evaluations_use_top_k(tmp_path: Path) -> None:
    model = adapted("llama").model
    found = record_choices(model)

    train(model, tmp_path, DenseStart(0.5), eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=16)

    assert [count for training, count in found if training] == [EXPERT_COUNT, EXPERT_COUNT, 2, 2]
    assert [count for training, count in found if not training] == [2, 2, 2, 2]
    assert not any(router.trains_all_experts for router in routers_of(model).values())


def test_dense_steps_are_those_of_lora(tmp_path: Path) -> None:
    model = adapted("llama", load_balancing_coef=0.0).model
    lora = get_peft_model(
        ARCHITECTURES["llama"](),
        LoraConfig(r=4, lora_alpha=8, target_modules=EXPERTS["llama"], task_type="CAUSAL_LM"),
    )
    set_peft_model_state_dict(lora, {name: t for name, t in tensors_for("llama").items() if ".lora_" in name})
    ours, of_lora = Snapshots(), Snapshots()

    train(model, tmp_path / "ours", ours, DenseStart(0.75))
    train(lora, tmp_path / "lora", of_lora)

    for dense, expected in zip(ours.weights[:3], of_lora.weights, strict=False):
        torch.testing.assert_close(dense, expected)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ours.weights[3], of_lora.weights[3])


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_is_the_same(tmp_path: Path, stop: int) -> None:
    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == stop

    whole, cut, resumed = adapted("llama").model, adapted("llama").model, adapted("llama").model
    saving = {"save_strategy": "steps", "save_steps": stop}

    train(whole, tmp_path / "whole", DenseStart(0.5))
    train(cut, tmp_path / "cut", DenseStart(0.5), Stop(), **saving)
    assert not any(router.trains_all_experts for router in routers_of(cut).values())
    train(resumed, tmp_path / "cut", DenseStart(0.5), resume=str(tmp_path / "cut" / f"checkpoint-{stop}"), **saving)

    torch.testing.assert_close(dict(resumed.named_parameters()), dict(whole.named_parameters()), rtol=0, atol=0)


def test_early_stopping_waits_for_the_sparse_steps(tmp_path: Path) -> None:
    arguments = MiLoraTrainingArguments(str(tmp_path), dense_share=0.5, use_cpu=True, report_to="none")

    dense, stopping = method_callbacks(adapted("llama").model, arguments, has_dev=True)

    assert isinstance(dense, DenseStart)
    assert isinstance(stopping, EarlyStopping)
    assert stopping.open_structures == [dense]


def test_without_experts_it_is_refused(tmp_path: Path) -> None:
    lora = get_peft_model(ARCHITECTURES["llama"](), LoraConfig(r=2, target_modules=["q_proj"]))
    arguments = MiLoraTrainingArguments(str(tmp_path), dense_share=0.5, use_cpu=True, report_to="none")

    with pytest.raises(MiLoraError, match=r"--dense_share 0\.5 needs a method with routers and experts"):
        method_callbacks(lora, arguments, has_dev=True)
    with pytest.raises(MiLoraError, match="the model has none"):
        train(lora, tmp_path, DenseStart(0.5))
    with pytest.raises(MiLoraError, match="dense_share must be at least 0 and below 1; found 1"):
        DenseStart(1.0)
