"""A step on a dev batch for some parameters, without any effect on the others."""

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
    """The rows of a dev set in endless rounds, each in a different order, in batches of one size.

    The rows of a step depend only on the seed and the step's number. They do not use torch's generators, so training
    batches have the same order with and without dev steps, and a resumed run continues like an uninterrupted one.
    Several processes divide the rows of a step among them.

    Args:
        rows: The tokenised rows, such as a `Dataset`.
        collate: Makes a batch from a list of rows.
        size: Rows per batch and process.
        seed: Seed of the rounds' orders.
        process: This process's index.
        processes: The number of processes.

    Raises:
        MiLoraError: If there are no rows.
    """

    def __init__(
        self, rows: Sequence[Any], collate: Any, size: int, seed: int, process: int = 0, processes: int = 1
    ) -> None:
        if not len(rows):
            raise MiLoraError("There are no dev rows.")
        self.rows = rows
        self.collate = collate
        self.size = size
        self.seed = seed
        self.process = process
        self.processes = processes

    def starting_at(self, step: int) -> Iterator[Batch]:
        """The endless sequence of batches from step `step` on."""
        while True:
            first = (step * self.processes + self.process) * self.size
            yield self.collate([self.rows[self._row(first + place)] for place in range(self.size)])
            step += 1

    def __iter__(self) -> Iterator[Batch]:
        return self.starting_at(0)

    def _row(self, place: int) -> int:
        """The row at an index of the endless sequence of rounds."""
        round_, within = divmod(place, len(self.rows))
        if getattr(self, "_round", None) != round_:
            self._round = round_
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + round_)
            self._order = torch.randperm(len(self.rows), generator=generator).tolist()
        return int(self._order[within])


class DevStep:
    """Trains some parameters on dev batches with a separate optimiser, between the steps of a trainer.

    One step is one forward and one backward pass over one batch, in which only these parameters get gradients.
    Afterwards their gradients are removed, so the trainer neither counts nor reduces them. Several processes, each with
    its own batches, use the mean of their gradients and so make the same step.

    Args:
        parameters: The trained parameters.
        optimizer: The optimiser of these parameters.
        batches: Batches with labels, as the model takes them; restarted when they run out.
        evaluation: Whether the step uses evaluation mode: without dropout and without training-only losses such as the
            load-balancing loss.
        arguments: Further arguments of the model.

    Attributes:
        steps: Number of steps, including skipped ones.
        skipped: Number of steps skipped because a gradient was not finite. With float16 loss scaling this happens
            occasionally; otherwise the first one causes a warning.
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
            model: The trained model, not wrapped for several processes.
            device: Device for the batches.
            scale: Factor of the loss in the backward pass for float16 gradients, divided out afterwards. `None` in
                other precisions.

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
        """State for a resumed run: the optimiser's state, the number of steps, and of skipped ones."""
        return {"optimizer": self.optimizer.state_dict(), "steps": self.steps, "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; [`DevBatches`] continue with the next batches."""
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
        """Averages the processes' gradients; `False` if one is not finite and the step must be skipped."""
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
        """Counts a skipped step; without a loss scale, which would decrease by itself, it warns once."""
        self.skipped += 1
        if self.skipped == 1 and not is_scaled and (processes() == 1 or distributed.get_rank() == 0):
            _log.warning(
                "The dev loss has a gradient that is not finite at dev step %d. Such steps are skipped, and the log "
                "counts them as dev_steps_skipped. If the count keeps rising, the model has diverged or a dev row is "
                "broken: lower --learning_rate, or check the dev rows.",
                self.steps,
            )


def endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches in endless rounds.

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
    """The number of processes."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def require_gradients(parameters: Iterable[nn.Parameter], required: bool) -> None:
    """Enables or disables gradients."""
    for parameter in parameters:
        parameter.requires_grad_(required)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, except for gradient checkpointing, which transformers enables in training mode only."""
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
