"""The structure search under the stock Trainer: training of gates and weights, the end, and saved files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from support.architectures import ARCHITECTURES, random_prompts
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from milora import MiLoraConfig, MiLoraError
from milora.training.ssp_search import SSPSearch
from milora.tuners.ssp import SSPConfig

SETTINGS = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1}


def rows(seed: int, count: int = 8) -> Dataset:
    tokens = random_prompts(count, 9, seed=seed)
    return Dataset.from_dict({"input_ids": tokens, "labels": tokens})


def batches(seed: int = 7, count: int = 8) -> list[dict[str, Tensor]]:
    tokens = torch.tensor(random_prompts(count, 9, seed=seed))
    return [{"input_ids": part, "labels": part} for part in tokens.split(4)]


def searching(**settings: Any) -> PeftModel:
    values = {"r": 2, "projection_dim": 3, "budget": 0.4, **settings}
    return get_peft_model(ARCHITECTURES["llama"](), SSPConfig(**values))


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    defaults = {"max_steps": 10, "learning_rate": 1e-2, "per_device_train_batch_size": 4, **SETTINGS}
    return TrainingArguments(str(folder), **{**defaults, **settings})


def train(model: PeftModel, folder: Path, search: SSPSearch, *more: TrainerCallback, **settings: Any) -> Trainer:
    callbacks = [search, *more]
    trainer = Trainer(
        model, arguments(folder, **settings), train_dataset=rows(1), eval_dataset=rows(2), callbacks=callbacks
    )
    trainer.train()
    return trainer


class Watch(TrainerCallback):
    """Records the gates, the candidates' weights and the optimiser's parameters after each step."""

    def __init__(self) -> None:
        self.logits: list[list[float]] = []
        self.weights: list[float] = []
        self.in_optimizer: list[int] = []
        self.states: list[int] = []
        self.budgets: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self.logits.append([value for parameter in model.gate_parameters() for value in parameter.tolist()])
        self.weights.append(sum(p.abs().sum().item() for n, p in model.named_parameters() if "lora_B" in n))
        self.in_optimizer.append(sum(len(group["params"]) for group in optimizer.param_groups))
        self.states.append(len(optimizer.state))
        self.budgets.append(model.expected_parameters())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_the_search_under_the_stock_trainer(tmp_path: Path) -> None:
    model, watch = searching(), Watch()
    budget = 0.4 * sum(p.numel() for n, p in model.named_parameters() if ".ssp_." in n and ".gate." not in n)
    candidates = 4 * len(model.gate_parameters())  # Two parameters for each of two kinds.
    trainer = train(model, tmp_path, SSPSearch(batches(), search_share=0.6, every=2), watch)
    # The gates learn at every second step, first by Adam's 0.1, and are removed after the sixth.
    assert [bool(logits) for logits in watch.logits] == [True] * 5 + [False] * 5
    assert watch.logits[0] == [0.0] * len(watch.logits[0])
    assert max(map(abs, watch.logits[1])) == pytest.approx(0.1, rel=0.01)
    assert watch.logits[2] == watch.logits[1]
    assert watch.logits[3] != watch.logits[2]
    # The trainer trains the candidates but not the gates; finally it trains the found structure, from zero.
    assert watch.in_optimizer[:5] == [candidates] * 5
    assert watch.weights[4] > watch.weights[0] > 0
    assert watch.weights[5] == 0
    assert watch.states[5] == 0
    kept = 2 * len(model.peft_config["default"].structure)
    assert watch.in_optimizer[5:] == [kept] * 5
    assert watch.states[6:] == [kept] * 4
    assert watch.weights[-1] > 0
    assert watch.budgets[:5] == pytest.approx([budget] * 5, rel=1e-2)
    assert 0.7 * budget < watch.budgets[-1] <= budget + 1
    trainer.save_model(str(tmp_path / "end"))
    again = PeftModel.from_pretrained(ARCHITECTURES["llama"](), tmp_path / "end")
    assert again.peft_config["default"].structure == model.peft_config["default"].structure
    assert json.loads((tmp_path / "end" / "adapter_config.json").read_text())["structure"]


def test_the_search_prefers_what_helps_on_the_dev_set(tmp_path: Path) -> None:
    # The last block's biases push away from the dev set's only token. Its LoRAs have no effect yet, but gain because
    # both share the budget, which is exactly the LoRAs' size: (32 + 32) + (48 + 32).
    model = searching(r=1, projection_dim=None, target_modules=r".*\.1\..*(o_proj|down_proj)", budget=144)
    harm = -model.get_output_embeddings().weight[5].detach()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bitfit.default.seed"):
                parameter.copy_(harm)
    assert len(set(model.probabilities().values())) == 1
    dev_batches = [{**batch, "labels": torch.full_like(batch["labels"], 5)} for batch in batches()]
    train(model, tmp_path, SSPSearch(dev_batches, search_share=0.9), learning_rate=0.0)
    assert [kind for _, kind in model.peft_config["default"].structure] == ["lora", "lora"]


def test_gates_that_nobody_searches_with_are_trained_with_the_rest(tmp_path: Path) -> None:
    model = searching()
    Trainer(model, arguments(tmp_path, max_steps=2), train_dataset=rows(1)).train()
    assert model.is_searching
    assert any(parameter.abs().max() > 0 for parameter in model.gate_parameters())


def test_the_best_checkpoint_is_one_with_the_structure(tmp_path: Path) -> None:
    model = searching()
    trainer = train(
        model,
        tmp_path,
        SSPSearch(batches(), search_share=0.5),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        # The loss rises, so the best of all steps would lie in the search.
        learning_rate=1.0,
    )
    assert trainer.state.best_global_step >= 5
    checkpoint = PeftModel.from_pretrained(ARCHITECTURES["llama"](), trainer.state.best_model_checkpoint)
    for (name, best), (_, loaded) in zip(checkpoint.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(best, loaded), name


def test_a_search_is_resumed(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    train(searching(), tmp_path, SSPSearch(batches(), search_share=0.9), max_steps=5, **saving)
    checkpoint = tmp_path / "checkpoint-3"
    model = PeftModel.from_pretrained(ARCHITECTURES["llama"](), checkpoint, is_trainable=True)
    assert model.is_searching
    trainer = Trainer(
        model,
        arguments(tmp_path, **saving),
        train_dataset=rows(1),
        callbacks=[SSPSearch(batches(), search_share=0.5)],
    )
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 10
    assert not model.is_searching


def test_a_fixed_structure_is_only_trained(tmp_path: Path) -> None:
    model = searching(structure=[["model.layers.0.mlp.up_proj", "lora"]])
    train(model, tmp_path, SSPSearch([]), max_steps=2)
    assert model.peft_config["default"].structure == [["model.layers.0.mlp.up_proj", "lora"]]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_out_of_range(share: float) -> None:
    with pytest.raises(MiLoraError, match="search_share"):
        SSPSearch([], search_share=share)


def test_mistakes_that_show_in_training(tmp_path: Path) -> None:
    with pytest.raises(MiLoraError, match="every must be"):
        SSPSearch([], every=0)
    with pytest.raises(MiLoraError, match="no dev batches"):
        train(searching(), tmp_path, SSPSearch([]))
    with pytest.raises(MiLoraError, match="has no labels"):
        train(searching(), tmp_path, SSPSearch([{"input_ids": torch.ones(1, 2, dtype=torch.long)}]))
    with pytest.raises(MiLoraError, match="gives the search 0"):
        train(searching(), tmp_path, SSPSearch(batches()), max_steps=2)
    with pytest.raises(MiLoraError, match="SSPModel"):
        train(get_peft_model(ARCHITECTURES["llama"](), MiLoraConfig(r=2)), tmp_path, SSPSearch(batches()))
