"""Stock trainers change a batch before the model gets it: withheld labels, packed rows, class labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from support.adapted import adapted
from support.architectures import ARCHITECTURES, random_prompts
from support.tokenizer import character_tokenizer
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from milora import IAPTConfig, MiLoraConfig
from milora_core.errors import MiLoraError

QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "max_steps": 1}


def labelled_rows() -> Dataset:
    rows = random_prompts(4, 9, seed=5)
    labels = [[-100] * 6 + row[6:] for row in rows]
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 9 for _ in rows], "labels": labels})


def text_rows() -> Dataset:
    prompts = [f"say {letter}:" for letter in "abcdefgh"]
    return Dataset.from_dict({"prompt": prompts, "completion": [f" {letter}" for letter in "abcdefgh"]})


def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)


class PopsLabels(Trainer):
    """A trainer with the `compute_loss` that many notebooks use."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = own_loss(outputs, labels)
        return (loss, outputs) if return_outputs else loss


def stock(model: Any, folder: Path, kind: type[Trainer] = Trainer, **settings: Any) -> Trainer:
    loss = {"compute_loss_func": own_loss} if settings.pop("own_loss", False) else {}
    arguments = TrainingArguments(str(folder), **{**QUIET, **settings})
    return kind(model, arguments, train_dataset=labelled_rows(), eval_dataset=labelled_rows(), **loss)


def sft(model: Any, folder: Path, own_loss_function: bool = False, **settings: Any) -> SFTTrainer:
    loss = {"compute_loss_func": own_loss} if own_loss_function else {}
    arguments = SFTConfig(str(folder), bf16=False, per_device_train_batch_size=4, **{**QUIET, **settings})
    tokenizer = character_tokenizer()
    more = {"processing_class": tokenizer, "train_dataset": text_rows(), "eval_dataset": text_rows()}
    return SFTTrainer(model, arguments, **more, **loss)


WITHHOLDING: dict[str, Callable[[Any, Path], Trainer]] = {
    "smoothing": lambda model, folder: stock(model, folder, label_smoothing_factor=0.1),
    "own loss": lambda model, folder: stock(model, folder, own_loss=True),
    "popped": lambda model, folder: stock(model, folder, PopsLabels),
    "SFT smoothing": lambda model, folder: sft(model, folder, label_smoothing_factor=0.1),
    "SFT own loss": lambda model, folder: sft(model, folder, own_loss_function=True),
}


@pytest.mark.filterwarnings("ignore:.*(label_smoothing_factor|compute_loss_func).*is deprecated:FutureWarning")
@pytest.mark.parametrize("call", ["train", "evaluate"])
@pytest.mark.parametrize("how", WITHHOLDING)
def test_labels_that_a_trainer_withholds_are_refused(tmp_path: Path, how: str, call: str) -> None:
    trainer = WITHHOLDING[how](adapted("llama").model, tmp_path)
    with pytest.raises(MiLoraError, match="without labels"):
        getattr(trainer, call)()


def test_so_they_are_for_iapt(tmp_path: Path) -> None:
    model = get_peft_model(ARCHITECTURES["llama"](), IAPTConfig())
    with pytest.raises(MiLoraError, match=r"without labels \(label_smoothing_factor\)"):
        stock(model, tmp_path, label_smoothing_factor=0.1).train()


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_logits_for_metrics_are_refused_without_labels(tmp_path: Path) -> None:
    trainer = sft(adapted("llama").model, tmp_path)
    trainer.compute_metrics = lambda prediction: {}
    with pytest.raises(MiLoraError, match="without labels"):
        trainer.evaluate()


def test_a_trainer_may_say_what_the_prompt_is(tmp_path: Path) -> None:
    class SaysThePrompt(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            labels = inputs.pop("labels")
            with model.use_prompt(labels == -100):
                outputs = model(**inputs)
            return own_loss(outputs, labels)

    model = adapted("llama", load_balancing_coef=0.0).model
    losses = []
    for kind in (Trainer, SaysThePrompt):
        trainer = stock(model, tmp_path, kind, learning_rate=0.0)
        losses.append(trainer.train().training_loss)
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_prediction_without_labels_and_callbacks_are_left_alone(tmp_path: Path) -> None:
    texts = []

    class Generates(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            texts.append(model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2))

    trainer = stock(adapted("llama").model, tmp_path)
    trainer.add_callback(Generates())
    trainer.train()
    assert texts[0].shape == (1, 5)
    assert trainer.predict(labelled_rows().remove_columns("labels")).predictions.shape[:2] == (4, 9)


@pytest.mark.parametrize(
    ("settings", "call"),
    [
        ({"packing": True, "packing_strategy": "wrapped"}, "train"),
        ({"packing": True, "packing_strategy": "wrapped"}, "evaluate"),
        ({"packing": True}, "train"),
        ({"eval_packing": True}, "evaluate"),
        ({"eval_packing": True, "packing_strategy": "wrapped"}, "evaluate"),
    ],
)
def test_rows_that_a_trainer_packs_are_refused(tmp_path: Path, settings: dict[str, Any], call: str) -> None:
    trainer = sft(adapted("llama").model, tmp_path, max_length=64, **settings)
    with pytest.raises(MiLoraError, match="into one row"):
        getattr(trainer, call)()


def test_rows_that_are_not_packed_train_beside_packed_ones(tmp_path: Path) -> None:
    assert sft(adapted("llama").model, tmp_path, max_length=64, eval_packing=True).train().training_loss > 0
    settings = {"packing": True, "packing_strategy": "wrapped", "eval_packing": False}
    assert sft(adapted("llama").model, tmp_path, max_length=64, **settings).evaluate()["eval_loss"] > 0


CLASSIFIERS = {"SEQ_CLS": LlamaForSequenceClassification, "TOKEN_CLS": LlamaForTokenClassification}


def classifier(task: str, config: Any = None, **settings: Any) -> PeftModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    backbone = CLASSIFIERS[task](LlamaConfig(vocab_size=97, pad_token_id=0, num_labels=3, **sizes, **settings))
    model = get_peft_model(backbone, config or MiLoraConfig(r=4, top_k=1, task_type=task, load_balancing_coef=0.0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "projection" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


def class_labels(task: str, rows: int, kind: str) -> torch.Tensor:
    if task == "TOKEN_CLS":
        labels = torch.randint(0, 3, (rows, 8))
        labels[:, :3] = -100
        return labels
    if kind == "several":
        return torch.randint(0, 2, (rows, 3)).float()
    return torch.randint(0, 3, (rows,))


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize(("task", "kind"), [("SEQ_CLS", "one"), ("SEQ_CLS", "several"), ("TOKEN_CLS", "one")])
def test_a_classifier_reads_the_whole_row_with_labels_and_without(task: str, kind: str, rows: int) -> None:
    model = classifier(task)
    ids = torch.randint(2, 97, (rows, 8))
    labels = class_labels(task, rows, kind)
    torch.testing.assert_close(model(ids, labels=labels).logits, model(ids).logits)


def test_a_classifiers_routers_see_all_of_a_padded_row() -> None:
    model = classifier("SEQ_CLS")
    ids, mask = torch.randint(2, 97, (1, 6)), torch.ones(1, 6, dtype=torch.long)
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids], dim=1)
    padded_mask = torch.cat([torch.zeros(1, 2, dtype=torch.long), mask], dim=1)
    alone = model(ids, attention_mask=mask).logits
    with_padding = model(padded, attention_mask=padded_mask, labels=torch.tensor([1])).logits
    torch.testing.assert_close(with_padding, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("task", CLASSIFIERS)
def test_a_classifier_trains_with_the_balance_loss_once(tmp_path: Path, task: str, accumulation: int) -> None:
    losses = {}
    rows = random_prompts(8, 8, seed=5)
    labels = class_labels(task, 8, "one").tolist()
    for coefficient in (0.0, 0.5):
        config = MiLoraConfig(r=4, top_k=1, task_type=task, load_balancing_coef=coefficient)
        model = classifier(task, config)
        settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 8 // accumulation}
        arguments = TrainingArguments(str(tmp_path), learning_rate=0.0, seed=1, **settings, **QUIET)
        data = Dataset.from_dict({"input_ids": rows, "labels": labels})
        losses[coefficient] = Trainer(model, arguments, train_dataset=data).train().training_loss
        balance = model.base_model.routing_statistics()["load_balancing_loss"]
    # transformers does not average a classifier's own loss over accumulated batches: it stays a sum.
    assert losses[0.5] - losses[0.0] == pytest.approx(0.5 * balance, abs=2e-4)


class GeneratesInItsStep(Trainer):
    """A trainer that generates in its own `compute_loss`."""

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            model.generate(
                input_ids=inputs["input_ids"][:, :6], attention_mask=inputs["attention_mask"][:, :6], max_new_tokens=2
            )
            model.base_model.route(input_ids=inputs["input_ids"][:, :6])
        return super().compute_loss(model, inputs, **kwargs)


def test_a_trainers_step_may_generate(tmp_path: Path) -> None:
    stock(adapted().model, tmp_path, GeneratesInItsStep).train()
