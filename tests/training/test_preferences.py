"""TRL's preference and reward trainers: the reference policy is the adapter's start, and rollouts are generated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from support.adapted import adapted
from support.tokenizer import character_tokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from milora.training.callbacks import DenseStart

QUIET: dict[str, Any] = {
    "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False, "save_strategy": "no", "max_steps": 1,
    "logging_steps": 1, "per_device_train_batch_size": 4,
}  # fmt: skip
LETTERS = "abcd"

pytestmark = [
    # TRL 1.16 calls these methods of transformers.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_disable` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
]


def first_entry(model: PeftModel, folder: Path, **settings: Any) -> dict[str, float]:
    """The log of a DPO step, in which the policy is still its reference."""
    rows = Dataset.from_dict(
        {
            "prompt": [f"say {letter}:" for letter in LETTERS],
            "chosen": [f" {letter}" for letter in LETTERS],
            "rejected": [" zzzzzzzzzzz"] * len(LETTERS),
        }
    )
    arguments = DPOConfig(str(folder), **{**QUIET, **settings})
    trainer = DPOTrainer(model, args=arguments, train_dataset=rows, processing_class=character_tokenizer())
    trainer.train()
    entry: dict[str, float] = trainer.state.log_history[0]
    return entry


@pytest.mark.parametrize("precomputed", [False, True])
def test_the_policy_of_dpo_starts_as_its_reference(tmp_path: Path, precomputed: bool) -> None:
    """The loss of equal policies is ln 2. The load-balancing loss must not lower the policy's log-probabilities."""
    model = adapted(load_balancing_coef=1.0).model
    with pytest.warns(UserWarning, match="load-balancing loss is left out"):
        entry = first_entry(model, tmp_path, precompute_ref_log_probs=precomputed)
    assert entry["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    assert entry["rewards/chosen"] == entry["rewards/rejected"] == 0


def test_the_reference_of_dpo_has_the_routers_center(tmp_path: Path) -> None:
    """TRL copies parameters into the reference adapter; the center is a buffer."""
    model = adapted(load_balancing_coef=0.0, router_norm="centered").model
    for router in model.base_model.hooks.routers.values():
        router.pooler["default"].center.normal_(generator=torch.Generator().manual_seed(0))
    entry = first_entry(model, tmp_path)
    assert entry["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    model.add_adapter("tenant", model.peft_config["default"])
    assert not any(router.pooler["tenant"].center.any() for router in model.base_model.hooks.routers.values())


@pytest.mark.parametrize("dense", [False, True])
def test_grpo_generates_its_rollouts(tmp_path: Path, dense: bool) -> None:
    """In a trainer's step, without labels, each rollout follows a route of `top_k` experts."""
    model = adapted(load_balancing_coef=0.0).model
    completions: list[str] = []

    def reward(**fields: Any) -> list[float]:
        completions.extend(fields["completions"])
        return [float(len(set(completion))) for completion in fields["completions"]]

    arguments = GRPOConfig(str(tmp_path), num_generations=2, max_completion_length=4, temperature=0.01, **QUIET)
    trainer = GRPOTrainer(
        model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [f"say {letter}:" for letter in LETTERS]}),
        processing_class=character_tokenizer(),
        callbacks=[DenseStart(0.9)] if dense else [],
    )
    with model.record_routes() as routes:
        trainer.train()
    assert trainer.state.global_step == 1
    assert len(completions) == 4
    assert routes
    assert all(bool(((route.gates != 0).sum(dim=-1) == 2).all()) for route in routes)
