"""Searches for a method's structure by first-order bi-level optimisation (as in DARTS, Liu et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from milora.training.dev_step import Batch, processes, require_gradients
from milora.training.dev_step_callback import DevStepCallback
from milora.training.stopping import forget_best
from milora.training.tuner import tuner_of
from milora_core.errors import MiLoraError


class ArchitectureSearch(DevStepCallback):
    """Trains the parameters that decide on a structure on dev batches, in any trainer of transformers.

    The trainer trains everything else on train batches, alternating step by step. Subclasses set `tuner_class`, and
    implement [`ArchitectureSearch.decisive`] and [`ArchitectureSearch.advance`]. The tuner's `is_searching` says
    whether there is a structure to search for; a model with a known structure is only trained.

    The trainer's best checkpoint is reset when the search ends, because no checkpoint of the search has the final
    structure.

    Args:
        dev_batches: Batches of the dev set with labels, as the model takes them, such as
            `trainer.get_eval_dataloader()`; restarted when they run out. `None` uses those of the
            [`milora.training.MiLoraTrainer`] with this callback.
        search_share: Share of the training steps after which the search ends.
        every: Number of trainer steps per step on a dev batch.
        learning_rate: Adam's learning rate for the structural parameters.
        betas: Adam's.

    Raises:
        MiLoraError: If an argument is out of range; when training begins, if the model has no such adapter, there are
            several processes but the search needs one, or there are too few steps; during the search, if there is no
            dev batch or it has no loss.
    """

    tuner_class: ClassVar[type]
    works_in_several_processes: ClassVar[bool] = False
    """Whether the trained parameters stay the same in all processes until the search ends."""

    def __init__(
        self,
        dev_batches: Iterable[Batch] | None,
        search_share: float,
        every: int,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        if not 0 < search_share <= 1:
            raise MiLoraError(f"search_share must be above 0 and at most 1; found {search_share}.")
        super().__init__(dev_batches, every, learning_rate)
        self.search_share = search_share
        self.betas = betas

    def is_open(self, model: Any, step: int) -> bool:
        """See [`milora.training.stopping.OpenStructure`]."""
        return bool(self._tuner(model).is_searching)

    def decisive(self, tuner: Any) -> list[nn.Parameter]:
        """The parameters that train on the dev set."""
        raise NotImplementedError(f"{type(self).__name__} does not define what it trains on the dev set.")

    def prepare(self, tuner: Any, steps: int) -> None:
        """Checks that a search with `steps` steps is possible."""
        if steps < self.every:
            raise MiLoraError(
                f"search_share={self.search_share} gives the search {steps} steps, and it learns every {self.every}. "
                "Train longer, or raise search_share."
            )

    def advance(self, tuner: Any, step: int, steps: int) -> bool:
        """Makes the structural changes due after step `step` of a search of `steps`.

        Returns:
            Whether the remaining structure restarts with a reset optimiser.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define how its search advances.")

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Excludes the structural parameters from the optimiser, which is created later, and so from its saved
        state."""
        require_gradients(self.decisive(self._tuner(model)), False)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Prepares the search."""
        tuner = self._tuner(model)
        if not tuner.is_searching:
            return
        if processes() > 1 and not self.works_in_several_processes:
            raise MiLoraError(
                f"{type(self).__name__} works in one process: the end of a search takes parameters away, which "
                "DistributedDataParallel cannot follow. Search in one process, then train the adapter in several."
            )
        self._steps = int(self.search_share * state.max_steps)
        self.prepare(tuner, self._steps)
        parameters = self.decisive(tuner)
        # They exist if this callback was added after the trainer was created.
        require_gradients(parameters, False)
        forget(optimizer, parameters)
        if self.dev_batches is None:
            raise MiLoraError(f"{type(self).__name__} has no dev batches to learn from.")
        # In training mode, because the candidates compete there.
        optimizer_of_search = torch.optim.Adam(parameters, lr=self.learning_rate, betas=self.betas)
        self.begin(parameters, optimizer_of_search, evaluation=False)

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Makes a step on a dev batch, and ends the search, when due."""
        tuner = self._tuner(model)
        if not tuner.is_searching:
            return
        self.step_if_due(model, args, state)
        before = list(tuner.parameters())
        begins_anew = self.advance(tuner, state.global_step, self._steps)
        remaining = {id(parameter) for parameter in tuner.parameters()}
        forget(optimizer, [parameter for parameter in before if id(parameter) not in remaining])
        if begins_anew:
            # Its state belongs to their previous weights.
            optimizer.state.clear()
        if not tuner.is_searching:
            forget_best(state)

    def _tuner(self, model: Any) -> Any:
        tuner = tuner_of(model)
        if not isinstance(tuner, self.tuner_class):
            raise MiLoraError(
                f"{type(self).__name__} searches for a {self.tuner_class.__name__}'s structure; the model is a "
                f"{type(model).__name__} without one."
            )
        return tuner


def forget(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    """Takes parameters out of an optimiser."""
    gone = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
