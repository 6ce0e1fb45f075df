"""AdaLoRA's ranks fall to the target under the stock Trainer with the callback, and not without it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from support.architectures import ARCHITECTURES, random_prompts
from transformers import Trainer, TrainerCallback, TrainingArguments

from milora import MiLoraError
from milora.methods import config_for
from milora.training.adalora import AdaLoraAllocation

STEPS = 20


def train(folder: Path, *callbacks: TrainerCallback, steps: int = STEPS, **settings: Any) -> PeftModel:
    backbone = ARCHITECTURES["llama"]()
    model = get_peft_model(backbone, config_for("adalora", backbone, init_r=8, total_step=STEPS, **settings))
    tokens = random_prompts(8, 9)
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    data = Dataset.from_dict({"input_ids": tokens, "labels": tokens})
    Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks)).train()
    return model


def ranks(model: PeftModel) -> list[int]:
    return [int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name]


class Ranks(TrainerCallback):
    def __init__(self) -> None:
        self.after_step: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after_step.append(sum(ranks(kwargs["model"])))


@pytest.mark.parametrize("tfinal", [6, 0])
def test_ranks_shrink_to_the_target(tmp_path: Path, tfinal: int) -> None:
    watch = Ranks()
    model = train(tmp_path, AdaLoraAllocation(), watch, deltaT=2, tfinal=tfinal)
    assert len(ranks(model)) == 14
    assert watch.after_step[0] == 14 * 8
    assert sum(ranks(model)) == 14 * 4
    assert len(set(ranks(model))) > 1  # Distributed by importance, not evenly.
    # After the tenth step: between two allocations the optimiser restores some ranks.
    assert 14 * 4 < watch.after_step[9] < 14 * 8
    # The target is kept once it is reached.
    assert watch.after_step[STEPS - tfinal - 1 :] == [14 * 4] * (tfinal + 1)


# PEFT reports a module without ranks as not gathered, and reads AdaLoRA's rank_pattern as LoRA's.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")
@pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape")
def test_the_pruned_adapter_is_saved_and_loaded(tmp_path: Path) -> None:
    model = train(tmp_path, AdaLoraAllocation()).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(ARCHITECTURES["llama"](), tmp_path / "adapter").eval()
    assert sum(p.numel() for name, p in again.named_parameters() if "lora_E" in name) == 14 * 4
    tokens = torch.tensor(random_prompts(2, 5))
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_without_the_callback_nothing_is_pruned(tmp_path: Path) -> None:
    assert sum(ranks(train(tmp_path))) == 14 * 8


def test_a_training_that_ends_before_the_schedule(tmp_path: Path) -> None:
    with pytest.raises(MiLoraError, match=r"reaches its target rank at step 14 .* ends at step 5: set total_step=5"):
        train(tmp_path, AdaLoraAllocation(), steps=5)


def test_another_method(tmp_path: Path) -> None:
    with pytest.raises(MiLoraError, match=r"needs get_peft_model\(model, AdaLoraConfig"):
        AdaLoraAllocation().on_train_begin(None, None, None, model=ARCHITECTURES["llama"]())
