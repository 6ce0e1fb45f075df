"""When a run ends early, and which checkpoint may be its best, where a method first decides on its structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from transformers import EarlyStoppingCallback, TrainerCallback


@runtime_checkable
class OpenStructure(Protocol):
    """A callback under which the model's structure is at first open: a search, or a pruning schedule."""

    def is_open(self, model: Any, step: int) -> bool:
        """Whether it is after optimiser step `step`, so that what is evaluated then is not what will be kept."""


class EarlyStopping(TrainerCallback):  # type: ignore[misc]
    """Ends a run after `patience` evaluations without a better one, none of them counted while a structure is open.

    A search makes the dev perplexity worse before it makes it better (what it finds begins anew), and ended in its
    midst it would leave an adapter that is none of the method's.

    It wraps transformers' `EarlyStoppingCallback` instead of inheriting from it: with
    `restore_callback_states_from_checkpoint` a trainer rebuilds that class from JSON, which cannot hold
    `open_structures`. A `MiLoraTrainer` saves the count with its own state, so a resumed run continues it, with the
    patience that the resumed run is given.

    Args:
        patience: Evaluations.
        open_structures: The callbacks during whose open structure evaluations are not counted.
    """

    def __init__(self, patience: int, open_structures: Sequence[OpenStructure] = ()) -> None:
        self.open_structures = open_structures
        self._stopping = EarlyStoppingCallback(patience)

    @property
    def count(self) -> int:
        """Evaluations since the best one."""
        return int(self._stopping.early_stopping_patience_counter)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks that there is something to go by."""
        self._stopping.on_train_begin(args, state, control, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, model: Any = None, **kwargs: Any) -> None:
        """Counts an evaluation."""
        if any(callback.is_open(model, state.global_step) for callback in self.open_structures):
            self._stopping.early_stopping_patience_counter = 0
            return
        self._stopping.on_evaluate(args, state, control, metrics, model=model, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"counter": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on counting."""
        self._stopping.early_stopping_patience_counter = state["counter"]


def forget_best(state: Any) -> None:
    """Makes a trainer choose its best checkpoint from those to come."""
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None
