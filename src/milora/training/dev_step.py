"""A step on a batch of the dev set for some parameters, which leaves no trace on any other."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from milora_core.errors import MiLoraError

_log = logging.getLogger(__name__)

Batch = Mapping[str, Any]


class DevBatches:
    """The rows of a dev set over and over, each round in an order of its own, cut into batches of one size.

    Which rows a step sees depends on nothing but the seed and the step's number: not on torch's generators, which
    therefore give the training batches the same order with dev steps as without, and not on what ran before, so that a
    resumed run goes on as the whole one would have. Several processes share out the rows of a step.

    Args:
        rows: The tokenised rows, such as a `Dataset`.
        collate: Makes a batch of a list of rows.
        size: Rows a batch, in each process.
        seed: Of the rounds' orders.
        process: This process's place among them.
        processes: How many there are.

    Raises:
        MiLoraError: If there are no rows.
    """

    def __init__(
        self, rows: Sequence[Any], collate: Any, size: int, seed: int, process: int = 0, processes: int = 1
    ) -> None:
        if not len(rows):
            raise MiLoraError("There are no dev rows to make a batch of.")
        self.rows = rows
        self.collate = collate
        self.size = size
        self.seed = seed
        self.process = process
        self.processes = processes

    def starting_at(self, step: int) -> Iterator[Batch]:
        """The batches from step `step` on, without an end."""
        while True:
            first = (step * self.processes + self.process) * self.size
            yield self.collate([self.rows[self._row(first + place)] for place in range(self.size)])
            step += 1

    def __iter__(self) -> Iterator[Batch]:
        return self.starting_at(0)

    def _row(self, place: int) -> int:
        """The row at a place of the endless sequence of rounds."""
        round_, within = divmod(place, len(self.rows))
        if getattr(self, "_round", None) != round_:
            self._round = round_
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + round_)
            self._order = torch.randperm(len(self.rows), generator=generator).tolist()
        return int(self._order[within])


class DevStep:
    """Trains some parameters on dev batches with an optimiser of their own, between the steps of a trainer.

    One step is one forward and one backward pass over one batch, in which nothing but these parameters gets gradients.
    After it they have none either, so that a trainer neither counts nor reduces them, and they need none outside it.
    Several processes, each with batches of its own, take the mean of their gradients and so the same step.

    Args:
        parameters: What is trained.
        optimizer: Over these parameters.
        batches: Batches with labels, as the model takes them; begun again when they run out.
        evaluation: Whether the step sees the model in evaluation mode: without dropout, and without losses that are
            for training alone, such as the load-balancing one.
        arguments: What the model is called with beside a batch.

    Attributes:
        steps: How many were made, those that were left out included.
        skipped: How many were left out, because a gradient was not finite. Under the loss scaling of float16 that
            happens now and then; otherwise the first one is warned of.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        batches: Iterable[Batch],
        *,
        evaluation: bool,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self.optimizer = optimizer
        self.batches = batches
        self.evaluation = evaluation
        self.arguments = dict(arguments or {})
        self.steps = 0
        self.skipped = 0
        self._iterator: Iterator[Batch] | None = None

    def __call__(self, model: nn.Module, device: torch.device, scale: float | None = None) -> Tensor:
        """Makes a step.

        Args:
            model: What the trainer trains, not wrapped for several processes.
            device: Where batches go.
            scale: Multiplies the loss for the backward pass, for the sake of gradients in float16; divided out again.
                `None` in other precisions.

        Returns:
            The loss on the batch, detached.

        Raises:
            MiLoraError: If there is no dev batch, or it has no loss.
        """
        others = [parameter for parameter in model.parameters() if parameter.requires_grad]
        require_gradients(others, False)
        require_gradients(self.parameters, True)
        try:
            batch = self._next(device)
            with _evaluating(model) if self.evaluation else _as_it_is():
                loss: Tensor = model(**batch, **self.arguments)["loss"]
                (loss if scale is None else loss * scale).backward()  # type: ignore[no-untyped-call]
            if self._reduce(1.0 if scale is None else scale):
                self.optimizer.step()
            else:
                self._skip(is_scaled=scale is not None)
        finally:
            self.optimizer.zero_grad()
            require_gradients(self.parameters, False)
            require_gradients(others, True)
        self.steps += 1
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the optimiser's state, the number of steps, and how many of them were left out."""
        return {"optimizer": self.optimizer.state_dict(), "steps": self.steps, "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; of [`DevBatches`], with the batches that would have come next."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
        self.skipped = state.get("skipped", 0)
        self._iterator = None

    def _next(self, device: torch.device) -> dict[str, Any]:
        if self._iterator is None:
            batches = self.batches
            self._iterator = batches.starting_at(self.steps) if isinstance(batches, DevBatches) else endless(batches)
        batch = next(self._iterator)
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def _reduce(self, scale: float) -> bool:
        """Takes the mean of the processes' gradients; false if one is not finite, and the step is left out."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        together = torch.cat([gradient.flatten().float() for gradient in gradients])
        together /= scale * processes()
        if processes() > 1:
            distributed.all_reduce(together)
        first = 0
        for gradient in gradients:
            gradient.copy_(together[first : first + gradient.numel()].view_as(gradient))
            first += gradient.numel()
        return bool(together.isfinite().all())

    def _skip(self, *, is_scaled: bool) -> None:
        """Counts a step that was left out; without a scale, which would fall by itself, it is warned of once."""
        self.skipped += 1
        if self.skipped == 1 and not is_scaled and (processes() == 1 or distributed.get_rank() == 0):
            _log.warning(
                "The dev loss has a gradient that is not finite at dev step %d: the step was left out, and so will be "
                "all like it, which the log counts as dev_steps_skipped. What trains on dev batches stays as it is in "
                "them. If the count goes on rising, the model has diverged or a dev row breaks it: lower "
                "--learning_rate, or look through the dev rows.",
                self.steps,
            )


def endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches over and over.

    Raises:
        MiLoraError: If there are none, or one has no labels.
    """
    while True:
        empty = True
        for batch in batches:
            empty = False
            if "labels" not in batch:
                raise MiLoraError(f"A dev batch of the search has no labels, only {list(batch)}.")
            yield batch
        if empty:
            raise MiLoraError("The search has no dev batches; pass some that can be iterated over more than once.")


def processes() -> int:
    """How many train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def require_gradients(parameters: Iterable[nn.Parameter], required: bool) -> None:
    """Switches gradients on or off."""
    for parameter in parameters:
        parameter.requires_grad_(required)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, but for what decides on gradient checkpointing, which transformers ties to training mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    for module in training:
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield
