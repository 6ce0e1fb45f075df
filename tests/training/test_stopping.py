"""Early stopping and the best checkpoint, for methods that first search a structure."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from transformers import TrainerControl, TrainerState

from milora.training.stopping import EarlyStopping, OpenStructure, forget_best


class Search:
    def is_open(self, model: Any, step: int) -> bool:
        return step < 5


def stops_at(losses: list[float], *open_structures: OpenStructure, patience: int = 2) -> int | None:
    callback, state, control = EarlyStopping(patience, open_structures), TrainerState(), TrainerControl()
    arguments = SimpleNamespace(metric_for_best_model="eval_loss", greater_is_better=False)
    for step, loss in enumerate(losses, start=1):
        state.global_step = step
        callback.on_evaluate(arguments, state, control, {"eval_loss": loss})
        if state.best_metric is None or loss < state.best_metric:
            state.best_metric = loss
        if control.should_training_stop:
            return step
        if open_structures and step == 4:
            forget_best(state)
    return None


def test_it_waits_for_the_structure() -> None:
    worse = [1.0, 2.0, 3.0, 4.0]
    assert stops_at(worse) == 3
    assert stops_at(worse, Search()) is None
    # After the search it counts, and compares only with later losses.
    assert stops_at([*worse, 3.5, 3.6, 3.7, 3.8], Search()) == 7
    assert stops_at([*worse, 3.5, 3.6, 3.4, 3.8], Search()) is None


def test_the_count_goes_on_when_a_run_is_resumed() -> None:
    first, second = EarlyStopping(3), EarlyStopping(3)
    first.load_state_dict({"counter": 2})
    second.load_state_dict(first.state_dict())
    assert second.count == 2
