"""The search of Learned-Adapter, under any trainer of transformers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import TrainerCallback

from milora.errors import MiLoraError
from milora.tuners.learned_adapter import LearnedAdapterModel


class LearnedAdapterSearch(TrainerCallback):  # type: ignore[misc]
    """Searches for the architecture during the first part of a training run; the rest trains what was found.

    After every optimiser step of the trainer, the architecture weights take a step on a dev batch (first-order
    bi-level optimisation, as in DARTS, Liu et al. 2019); the trainer itself leaves them alone. At evenly spaced steps
    the weakest candidates are dropped, the last ones at the end of `search_share`.

    `Trainer(model, ..., callbacks=[LearnedAdapterSearch(dev_batches)])`. A run that is resumed begins with
    `PeftModel.from_pretrained(backbone, checkpoint, is_trainable=True)`, during the search and after it: which
    parameters there are depends on how far the search was. Resumed during the search, the architecture weights and the
    drops go on where they were, but their Adam and the dev batches begin anew. A model whose architecture is known is
    only trained.

    What the trainer holds to be the best checkpoint is forgotten when the search ends, because no checkpoint from the
    search has the architecture that was found.

    Args:
        dev_batches: Batches of the dev set with labels, as the model takes them; begun again when they run out.
        search_share: Share of the training steps in which the search ends.
        learning_rate: Adam's, of the architecture weights; the default is DARTS's.
        retrain: Whether the adapters start again when the search ends, with an optimiser that has forgotten them. The
            learning rate goes on where it was.

    Raises:
        MiLoraError: If `search_share` is not above 0 and at most 1; when training begins, if the model has no learned
            adapter or the steps are too few; during the search, if there is no dev batch or it has no loss.
    """

    def __init__(
        self,
        dev_batches: Iterable[Mapping[str, Any]],
        search_share: float = 0.3,
        learning_rate: float = 3e-4,
        retrain: bool = True,
    ) -> None:
        if not 0 < search_share <= 1:
            raise MiLoraError(f"search_share must be above 0 and at most 1; found {search_share}.")
        self.dev_batches = dev_batches
        self.search_share = search_share
        self.learning_rate = learning_rate
        self.retrain = retrain
        self._rounds = 0

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Keeps the architecture weights out of the optimiser, which is made later."""
        for weights in _tuner(model).architecture_parameters():
            weights.requires_grad_(False)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Prepares the search, or what is left of it."""
        tuner = _tuner(model)
        if not tuner.is_searching:
            return
        self._rounds = tuner.rounds
        self._steps = int(self.search_share * state.max_steps)
        if self._steps < self._rounds:
            raise MiLoraError(
                f"The search drops candidates {self._rounds} times, and search_share={self.search_share} of "
                f"{state.max_steps} steps leaves it {self._steps}. Train for longer, or raise search_share."
            )
        weights = tuner.architecture_parameters()
        for parameter in weights:
            parameter.requires_grad_(False)
        # They are there if this callback was added after the trainer was made.
        _forget(optimizer, weights)
        self._architecture_optimizer = torch.optim.Adam(weights, lr=self.learning_rate, betas=(0.5, 0.999))
        self._batches = _endless(self.dev_batches)

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """A step of the architecture weights, and the drops that are due."""
        tuner = _tuner(model)
        if not tuner.is_searching:
            return
        self._learn(model, args.device)
        due = self._rounds * state.global_step // self._steps
        while tuner.rounds_left and self._rounds - tuner.rounds_left < due:
            before = [parameter for parameter in tuner.parameters() if parameter.requires_grad]
            tuner.drop_weakest()
            remaining = {id(parameter) for parameter in tuner.parameters()}
            _forget(optimizer, [parameter for parameter in before if id(parameter) not in remaining])
        if tuner.rounds_left == 0:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
            if self.retrain:
                tuner.reset_parameters()
                for parameter in tuner.parameters():
                    optimizer.state.pop(parameter, None)

    def _learn(self, model: nn.Module, device: torch.device) -> None:
        """A step of the architecture weights on the next dev batch."""
        batch = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in next(self._batches).items()
        }
        weights = self._architecture_optimizer.param_groups[0]["params"]
        for parameter in weights:
            parameter.requires_grad_(True)
        loss = model(**batch)["loss"]
        # Of the architecture weights only: nothing of a dev batch may reach the trainer's gradients.
        gradients = torch.autograd.grad(loss, weights)
        for parameter, gradient in zip(weights, gradients, strict=True):
            if distributed.is_available() and distributed.is_initialized():
                distributed.all_reduce(gradient)
                gradient /= distributed.get_world_size()
            parameter.grad = gradient
        self._architecture_optimizer.step()
        self._architecture_optimizer.zero_grad()
        for parameter in weights:
            parameter.requires_grad_(False)


def _tuner(model: Any) -> LearnedAdapterModel:
    tuner = getattr(getattr(model, "module", model), "base_model", None)
    if not isinstance(tuner, LearnedAdapterModel):
        raise MiLoraError(
            f"LearnedAdapterSearch needs get_peft_model(model, LearnedAdapterConfig()); found {type(model).__name__}."
        )
    return tuner


def _endless(batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            if "labels" not in batch:
                raise MiLoraError(f"A dev batch of the search has no labels, only {list(batch)}.")
            yield batch
        if empty:
            raise MiLoraError("The search has no dev batches; pass some that can be iterated over more than once.")


def _forget(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    """Takes parameters out of an optimiser."""
    gone = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
