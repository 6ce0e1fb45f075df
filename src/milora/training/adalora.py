"""AdaLoRA's rank allocation, under any trainer of transformers."""

from __future__ import annotations

from typing import Any

from peft import AdaLoraModel
from transformers import TrainerCallback

from milora.errors import MiLoraError
from milora.training.stopping import forget_best


class AdaLoraAllocation(TrainerCallback):  # type: ignore[misc]
    """Calls PEFT's `update_and_allocate` at every optimiser step, without which AdaLoRA never drops a rank.

    `Trainer(model, ..., callbacks=[AdaLoraAllocation()])`. It is called after the optimiser's step and before the
    gradients are cleared, as PEFT's documentation has it: what a rank is worth is read from weights times gradients
    (Zhang et al. 2023, section 3.2). Steps count from 1, so that the last allocation, at `total_step - tfinal`, is also
    made where `tfinal` is 0.

    Raises:
        MiLoraError: When training begins, if the model has no AdaLoRA adapter, or ends before the schedule does.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Checks that the ranks will be down at the target when training ends."""
        tuner = _tuner(model)
        config = tuner.peft_config[tuner.trainable_adapter_name]
        if config.total_step - config.tfinal > state.max_steps:
            raise MiLoraError(
                f"AdaLoRA's schedule reaches its target rank at step {config.total_step - config.tfinal} (total_step - "
                f"tfinal), and training ends at step {state.max_steps}: set total_step={state.max_steps}."
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Allocates, while the gradients are there."""
        _tuner(model).update_and_allocate(state.global_step + 1)

    def is_open(self, model: Any, step: int) -> bool:
        """See [`milora.training.stopping.Undecided`]."""
        tuner = _tuner(model)
        config = tuner.peft_config[tuner.trainable_adapter_name]
        return bool(step < config.total_step - config.tfinal)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Forgets the best checkpoint when the ranks are down: no earlier one is within the budget."""
        if not self.is_open(model, state.global_step) and self.is_open(model, state.global_step - 1):
            forget_best(state)


def _tuner(model: Any) -> Any:
    tuner = getattr(getattr(model, "module", model), "base_model", None)
    if not isinstance(tuner, AdaLoraModel):
        raise MiLoraError(
            f"AdaLoraAllocation needs get_peft_model(model, AdaLoraConfig(...)); found {type(model).__name__}."
        )
    return tuner
