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
    """Trains the parameters that decide on a structure on dev batches, under any trainer of transformers.

    The trainer trains everything else on train batches, step by step in turn. Subclasses set `tuner_class`, and
    implement [`ArchitectureSearch.decisive`] and [`ArchitectureSearch.advance`]. The tuner says by `is_searching` if
    there is a structure to search for; a model whose structure is known is only trained.

    What the trainer holds to be the best checkpoint is forgotten when the search ends, because no checkpoint from the
    search has the structure that was found.

    Args:
        dev_batches: Batches of the dev set with labels, as the model takes them, such as
            `trainer.get_eval_dataloader()`; begun again when they run out. `None` for those of the
            [`milora.training.MiLoraTrainer`] that the callback is given to.
        search_share: Share of the training steps in which the search ends.
        every: Trainer's steps for one step on a dev batch.
        learning_rate: Adam's, of what is decisive.
        betas: Adam's.

    Raises:
        MiLoraError: If an argument is out of range; when training begins, if the model has no such adapter, there are
            several processes where only one can search, or the steps are too few; during the search, if there is no
            dev batch or it has no loss.
    """

    tuner_class: ClassVar[type]
    works_in_several_processes: ClassVar[bool] = False
    """Whether what trains stays the same in every process until the search ends."""

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
        """The parameters that are trained on the dev set."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it trains on the dev set.")

    def prepare(self, tuner: Any, steps: int) -> None:
        """Checks that a search of `steps` steps can be made."""
        if steps < self.every:
            raise MiLoraError(
                f"search_share={self.search_share} leaves the search {steps} steps, and it learns every {self.every}. "
                "Train for longer, or raise search_share."
            )

    def advance(self, tuner: Any, step: int, steps: int) -> bool:
        """Makes the structural changes that are due after step `step` of a search of `steps`.

        Returns:
            Whether what is left begins anew, with an optimiser that knows nothing of it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how its search advances.")

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Keeps what is decisive out of the optimiser, which is made later, and so out of what a resumed run loads."""
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
        # They are there if this callback was added after the trainer was made.
        require_gradients(parameters, False)
        forget(optimizer, parameters)
        if self.dev_batches is None:
            raise MiLoraError(f"{type(self).__name__} has no dev batches to learn from.")
        # In training mode, because that is where the candidates compete.
        optimizer_of_search = torch.optim.Adam(parameters, lr=self.learning_rate, betas=self.betas)
        self.begin(parameters, optimizer_of_search, evaluation=False)

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """A step on a dev batch when it is due, and the end of the search when that is."""
        tuner = self._tuner(model)
        if not tuner.is_searching:
            return
        self.step_if_due(model, args, state)
        before = list(tuner.parameters())
        begins_anew = self.advance(tuner, state.global_step, self._steps)
        remaining = {id(parameter) for parameter in tuner.parameters()}
        forget(optimizer, [parameter for parameter in before if id(parameter) not in remaining])
        if begins_anew:
            # What it knows of them is about the weights they had.
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
