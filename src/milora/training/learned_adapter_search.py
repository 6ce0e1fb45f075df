"""The search of Learned-Adapter for any trainer of transformers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from milora.training.architecture_search import ArchitectureSearch
from milora.training.dev_step import Batch
from milora.tuners.learned_adapter import LearnedAdapterModel
from milora_core.errors import MiLoraError


class LearnedAdapterSearch(ArchitectureSearch):
    """Searches for the architecture in the first part of a training run; the rest trains the found architecture.

    After every optimiser step of the trainer, the architecture weights make a step on a dev batch (first-order bi-level
    optimisation, as in DARTS, Liu et al. 2019); the trainer does not change them. The weakest candidates are dropped at
    evenly spaced steps, the last ones at the end of `search_share`.

    `Trainer(model, ..., callbacks=[LearnedAdapterSearch(dev_batches)])`. To resume a run, start from
    `PeftModel.from_pretrained(backbone, checkpoint, is_trainable=True)`, because the parameters depend on the state of
    the search. Architecture weights and drops continue. Their Adam state and the dev batches continue in a
    `MiLoraTrainer`, whose checkpoints contain them, and restart in other trainers. A model with a known architecture is
    only trained.

    The trainer's best checkpoint is reset when the search ends, because no checkpoint of the search has the final
    architecture.

    Args:
        dev_batches: Batches of the dev set with labels, as the model takes them; restarted when they run out.
        search_share: Share of the training steps after which the search ends.
        learning_rate: Adam's learning rate for the architecture weights; the default is DARTS's.
        retrain: Whether the adapters restart after the search with a reset optimiser. The learning rate schedule
            continues.

    Raises:
        MiLoraError: If `search_share` is not above 0 and at most 1; when training begins, if the model has no learned
            adapter or the steps are too few; during the search, if there is no dev batch or it has no loss.
    """

    tuner_class = LearnedAdapterModel
    works_in_several_processes = True

    def __init__(
        self,
        dev_batches: Iterable[Batch] | None = None,
        search_share: float = 0.3,
        learning_rate: float = 3e-4,
        retrain: bool = True,
    ) -> None:
        super().__init__(dev_batches, search_share, 1, learning_rate, betas=(0.5, 0.999))
        self.retrain = retrain

    def decisive(self, tuner: Any) -> list[nn.Parameter]:
        """The architecture weights."""
        parameters: list[nn.Parameter] = tuner.architecture_parameters()
        return parameters

    def prepare(self, tuner: Any, steps: int) -> None:
        """Checks that there are enough steps for all rounds of drops."""
        self._rounds = tuner.rounds
        if steps < self._rounds:
            raise MiLoraError(
                f"The search drops candidates {self._rounds} times, but search_share={self.search_share} gives it "
                f"{steps} steps. Train longer, or raise search_share."
            )

    def advance(self, tuner: Any, step: int, steps: int) -> bool:
        """Drops the weakest candidates when due; after the last drop the adapters may restart."""
        due = self._rounds * step // steps
        while tuner.rounds_left and self._rounds - tuner.rounds_left < due:
            tuner.drop_weakest()
        if tuner.rounds_left or not self.retrain:
            return False
        tuner.reset_parameters()
        return True
