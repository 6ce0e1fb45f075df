"""Early stopping and the best checkpoint for methods that first decide on their structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from transformers import EarlyStoppingCallback, TrainerCallback


class OpenStructure(Protocol):
    """A callback during which the model's structure is not final at first: a search, a pruning schedule, or training of
    all experts."""

    def is_open(self, model: Any, step: int) -> bool:
        """Whether the structure is open after optimiser step `step`, so an evaluation then is not of the final
        structure."""


class EarlyStopping(TrainerCallback):  # type: ignore[misc]
    """Ends a run after `patience` evaluations without improvement; evaluations with an open structure do not count.

    A search increases the dev perplexity before it decreases (the found structure restarts), and a run that ends during
    the search would leave an incomplete adapter.

    It wraps transformers' `EarlyStoppingCallback` instead of inheriting from it: with
    `restore_callback_states_from_checkpoint` a trainer rebuilds that class from JSON, which cannot represent
    `open_structures`. A `MiLoraTrainer` saves the count in its own state, so a resumed run continues it with its own
    patience.

    Args:
        patience: Number of evaluations.
        open_structures: The callbacks with an open structure, during which evaluations do not count.
    """

    def __init__(self, patience: int, open_structures: Sequence[OpenStructure] = ()) -> None:
        self.open_structures = open_structures
        self._stopping = EarlyStoppingCallback(patience)

    @property
    def count(self) -> int:
        """Number of evaluations since the best one."""
        return int(self._stopping.early_stopping_patience_counter)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks that there is a metric to stop by."""
        self._stopping.on_train_begin(args, state, control, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, model: Any = None, **kwargs: Any) -> None:
        """Counts an evaluation."""
        if any(callback.is_open(model, state.global_step) for callback in self.open_structures):
            self._stopping.early_stopping_patience_counter = 0
            return
        self._stopping.on_evaluate(args, state, control, metrics, model=model, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """State for a resumed run."""
        return {"counter": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the count."""
        self._stopping.early_stopping_patience_counter = state["counter"]


def forget_best(state: Any) -> None:
    """Makes a trainer choose its best checkpoint from later ones only."""
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None
