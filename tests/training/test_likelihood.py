"""Dev perplexity is exp of the mean negative log-likelihood of the supervised tokens, for any training loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from support.adapted import adapted
from support.architectures import ARCHITECTURES
from support.tokenizer import character_tokenizer
from trl import SFTConfig, SFTTrainer

from milora.training import MiLoraTrainer, TrainingArguments
from milora_core.errors import MiLoraError

QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "max_steps": 1}
UNEVEN = ["a", "bcdefgh", "ij", "klmno", "p", "qrstuvwxyz", "A", "BC", "DEFG"]


def rows() -> Dataset:
    return Dataset.from_dict({"prompt": [f"say {text}:" for text in UNEVEN], "completion": [f" {t}" for t in UNEVEN]})


def lora() -> PeftModel:
    return get_peft_model(ARCHITECTURES["llama"](), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))


def milora_trainer(model: Any, folder: Path, **settings: Any) -> MiLoraTrainer:
    more = {name: settings.pop(name) for name in ("compute_loss_func", "compute_metrics") if name in settings}
    fields = {"activation_training": "frozen", "eval_on_start": False, "bf16": False, **QUIET, **settings}
    arguments = TrainingArguments(str(folder), **fields)
    tokenizer = character_tokenizer()
    more |= {"processing_class": tokenizer, "train_dataset": rows(), "eval_dataset": rows()}
    return MiLoraTrainer(model, arguments, **more)


@torch.no_grad()
def by_hand(model: Any) -> float:
    """The model's own log-probabilities of completion and end tokens, row by row without padding."""
    tokenizer = character_tokenizer()
    total = tokens = 0.0
    for row in rows():
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + whole[len(prompt) :]])
        logits = model(input_ids=torch.tensor([whole]), labels=labels).logits[0, len(prompt) - 1 : -1]
        chosen = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(whole[len(prompt) :])[:, None])
        total, tokens = total - chosen.sum().item(), tokens + len(chosen)
    return math.exp(total / tokens)


def mean_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return outputs["logits"].float().pow(2).mean()


@pytest.mark.filterwarnings("ignore:.*(label_smoothing_factor|compute_loss_func).*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"per_device_eval_batch_size": 1},
        {"per_device_eval_batch_size": 4},
        {"loss_type": "dft"},
        {"label_smoothing_factor": 0.2},
        {"compute_loss_func": mean_loss},
    ],
    ids=lambda settings: next(iter(settings), "plain") + str(settings.get("per_device_eval_batch_size", "")),
)
def test_perplexity_is_of_the_tokens_and_of_nothing_else(tmp_path: Path, settings: dict[str, Any]) -> None:
    trainer = milora_trainer(lora(), tmp_path, **settings)
    trainer.evaluate()
    logged = trainer.state.log_history[-1]
    assert logged["eval_perplexity"] == pytest.approx(by_hand(trainer.model), rel=1e-4)
    assert math.log(logged["eval_perplexity"]) == pytest.approx(logged["eval_loss"])
    # The training loss stays the requested one.
    assert trainer.args.loss_type == settings.get("loss_type", "nll")
    assert (trainer.label_smoother is not None) == ("label_smoothing_factor" in settings)
    assert trainer.compute_loss_func is settings.get("compute_loss_func")


def test_so_it_is_with_routes(tmp_path: Path) -> None:
    trainer = milora_trainer(adapted("llama", load_balancing_coef=1.0).model, tmp_path, per_device_eval_batch_size=2)
    trainer.evaluate()
    assert trainer.state.log_history[-1]["eval_perplexity"] == pytest.approx(by_hand(trainer.model), rel=1e-4)


def test_several_dev_sets_have_a_perplexity_each(tmp_path: Path) -> None:
    trainer = milora_trainer(lora(), tmp_path)
    few = Dataset.from_dict(rows()[:3])
    trainer.evaluate({"all": rows(), "few": few})
    found = {name: value for logs in trainer.state.log_history for name, value in logs.items() if "perplexity" in name}
    assert found["eval_all_perplexity"] == pytest.approx(by_hand(trainer.model), rel=1e-4)
    assert found["eval_few_perplexity"] != found["eval_all_perplexity"]


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_the_logits_of_metrics_have_the_prompts_routes(tmp_path: Path) -> None:
    seen = []
    model = adapted("llama").model
    trainer = milora_trainer(model, tmp_path, compute_metrics=lambda prediction: seen.append(prediction) or {})
    trainer.evaluate()
    batch = trainer.data_collator([trainer.eval_dataset[index] for index in range(len(UNEVEN))])
    with torch.no_grad():
        expected = model(**batch).logits
    attended = batch["attention_mask"].bool()
    found = torch.from_numpy(seen[0].predictions)[:, : expected.shape[1]]
    torch.testing.assert_close(found[attended], expected[attended], atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*(label_smoothing_factor|compute_loss_func).*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor makes the trainer remove"),
        ({"compute_loss_func": mean_loss}, "compute_loss_func makes the trainer remove"),
        ({"loss_type": "dft"}, "the load-balancing loss too"),
    ],
)
def test_losses_that_lose_the_routes_are_refused_before_the_first_step(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(MiLoraError, match=message):
        milora_trainer(adapted("llama").model, tmp_path, **settings)


def test_dft_trains_without_a_balance_loss_and_is_refused_with_one_by_a_stock_trainer(tmp_path: Path) -> None:
    def trainer(coefficient: float) -> SFTTrainer:
        model = adapted("llama", load_balancing_coef=coefficient).model
        arguments = SFTConfig(str(tmp_path), loss_type="dft", bf16=False, **QUIET)
        return SFTTrainer(model, arguments, train_dataset=rows(), processing_class=character_tokenizer())

    assert trainer(0.0).train().training_loss > 0
    with pytest.raises(MiLoraError, match="'dft' weights each token"):
        trainer(0.1).train()


@pytest.mark.parametrize("setting", ["packing", "eval_packing", "padding_free"])
def test_packing_is_refused_of_either_set(tmp_path: Path, setting: str) -> None:
    with pytest.raises(MiLoraError, match=f"{setting} puts several prompts into one row"):
        TrainingArguments(str(tmp_path), **{setting: True}, **QUIET)
