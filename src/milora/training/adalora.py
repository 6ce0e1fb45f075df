"""AdaLoRA's rank allocation for any trainer of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import AdaLoraModel
from torch import Tensor
from transformers import TrainerCallback

from milora.training.stopping import forget_best
from milora.training.tuner import tuner_of
from milora_core.errors import MiLoraError

IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""Attributes in which PEFT's rank allocator keeps each element's importance, by parameter name."""


class AdaLoraAllocation(TrainerCallback):  # type: ignore[misc]
    """Calls PEFT's `update_and_allocate` at every optimiser step; without it AdaLoRA never prunes a rank.

    `Trainer(model, ..., callbacks=[AdaLoraAllocation()])`. The call comes after the optimiser's step and before the
    gradients are cleared, as in PEFT's documentation: a rank's importance is computed from weights times gradients
    (Zhang et al. 2023, section 3.2). Steps count from 1, so the last allocation, at `total_step - tfinal`, also happens
    if `tfinal` is 0.

    Raises:
        MiLoraError: When training begins, if the model has no AdaLoRA adapter, or training ends before the schedule.
    """

    def __init__(self) -> None:
        self._model: Any = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Stores the model, because a checkpoint must keep more than its adapter's file."""
        self._model = model

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Checks that the ranks will reach the target before training ends."""
        tuner = _tuner(model)
        config = tuner.peft_config[tuner.trainable_adapter_name]
        if config.total_step - config.tfinal < 2:
            raise MiLoraError(
                f"AdaLoRA's schedule needs at least two steps before its target rank; found total_step="
                f"{config.total_step} and tfinal={config.tfinal}. Train longer."
            )
        if config.total_step - config.tfinal > state.max_steps:
            raise MiLoraError(
                f"AdaLoRA's schedule reaches its target rank at step {config.total_step - config.tfinal} (total_step - "
                f"tfinal), and training ends at step {state.max_steps}: set total_step={state.max_steps}."
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Allocates ranks while the gradients exist."""
        _tuner(model).update_and_allocate(state.global_step + 1)

    def is_open(self, model: Any, step: int) -> bool:
        """See [`milora.training.stopping.OpenStructure`]."""
        tuner = _tuner(model)
        config = tuner.peft_config[tuner.trainable_adapter_name]
        return bool(step < config.total_step - config.tfinal)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Resets the best checkpoint when the ranks reach the target: no earlier one is within the budget."""
        if not self.is_open(model, state.global_step) and self.is_open(model, state.global_step - 1):
            forget_best(state)

    def state_dict(self) -> dict[str, Any]:
        """State for a resumed run that PEFT does not save, because its file is pruned: every rank and its
        importance."""
        tuner = _tuner(self._model)
        allocator = tuner.rankallocator
        return {
            "weights": {name: p.detach().cpu() for name, p in tuner.model.named_parameters() if p.requires_grad},
            "importance": {name: dict(getattr(allocator, name)) for name in IMPORTANCE},
            "rank_pattern": tuner.peft_config[tuner.trainable_adapter_name].rank_pattern,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state into a model with all ranks."""
        tuner = _tuner(self._model)
        weights = dict(tuner.model.named_parameters())
        with torch.no_grad():
            for name, value in state["weights"].items():
                weights[name].copy_(value)
        for name, values in state["importance"].items():
            on_device = {key: value.to(weights[key].device) for key, value in values.items()}
            setattr(tuner.rankallocator, name, on_device)
        tuner.peft_config[tuner.trainable_adapter_name].rank_pattern = state["rank_pattern"]


def orthogonality_penalty(tuner: AdaLoraModel) -> Tensor:
    """`w * mean ||P P^T - I||_F` over the adapter's A and B^T, AdaLoRA's regularisation (its equation 4).

    PEFT adds it to an output's `loss`, which `SFTTrainer` does not read.
    """
    adapter = tuner.trainable_adapter_name
    norms = []
    for name, parameter in tuner.model.named_parameters():
        is_a = f"lora_A.{adapter}" in name
        if is_a or f"lora_B.{adapter}" in name:
            product = parameter @ parameter.T if is_a else parameter.T @ parameter
            norms.append(torch.linalg.matrix_norm(product - torch.eye(len(product), device=product.device)))
    penalty: Tensor = tuner.peft_config[adapter].orth_reg_weight * torch.stack(norms).mean()
    return penalty


def _tuner(model: Any) -> Any:
    tuner = tuner_of(model)
    if not isinstance(tuner, AdaLoraModel):
        raise MiLoraError(
            f"AdaLoraAllocation needs get_peft_model(model, AdaLoraConfig(...)); found {type(model).__name__}."
        )
    return tuner
