"""Base of the callbacks that train parameters on dev batches between the steps of a trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from milora.training.dev_step import Batch, DevStep
from milora_core.errors import MiLoraError


class DevStepCallback(TrainerCallback):  # type: ignore[misc]
    """Owns a [`DevStep`] during training, whose state is in a `MiLoraTrainer`'s checkpoints.

    Subclasses call [`DevStepCallback.begin`] when training begins, and [`DevStepCallback.step_if_due`] after a step of
    the trainer.

    Args:
        dev_batches: Batches of the dev set with labels, as the model takes them. `None` uses those that
            [`milora.training.MiLoraTrainer`] sets with [`DevStepCallback.use_batches`].
        every: Number of trainer steps per step on a dev batch.
        learning_rate: Learning rate of that step.

    Raises:
        MiLoraError: If `every` is out of range.
    """

    def __init__(self, dev_batches: Iterable[Batch] | None, every: int, learning_rate: float) -> None:
        if every < 1:
            raise MiLoraError(f"every must be at least 1; found {every}.")
        self.dev_batches = dev_batches
        self.every = every
        self.learning_rate = learning_rate
        self._model_arguments: Mapping[str, Any] = {}
        self._loss_scale: Callable[[], float | None] = _no_scale
        self._step: DevStep | None = None
        self._resumed: Mapping[str, Any] | None = None

    def use_batches(
        self,
        dev_batches: Iterable[Batch],
        *,
        model_arguments: Mapping[str, Any] | None = None,
        loss_scale: Callable[[], float | None] | None = None,
    ) -> None:
        """Sets the dev batches, before training begins.

        Args:
            dev_batches: See the class.
            model_arguments: Further arguments of the model.
            loss_scale: Returns the trainer's loss scale, or `None` if there is none.
        """
        self.dev_batches = dev_batches
        self._model_arguments = model_arguments or {}
        self._loss_scale = loss_scale or _no_scale

    @property
    def steps(self) -> int:
        """The number of steps on dev batches, including skipped ones."""
        return 0 if self._step is None else self._step.steps

    @property
    def skipped(self) -> int:
        """The number of skipped steps; see [`milora.training.dev_step.DevStep`]."""
        return 0 if self._step is None else self._step.skipped

    def begin(self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, *, evaluation: bool) -> None:
        """Creates the step or restores it from a checkpoint; the arguments are [`DevStep`]'s."""
        assert self.dev_batches is not None
        self._step = DevStep(
            parameters, optimizer, self.dev_batches, evaluation=evaluation, arguments=self._model_arguments
        )
        if self._resumed is not None:
            self._step.load_state_dict(self._resumed)
            self._resumed = None

    def step_if_due(self, model: nn.Module, args: Any, state: Any) -> Tensor | None:
        """Makes a step on a dev batch and returns its loss; `None` if none is due or training has not begun."""
        if self._step is None or state.global_step % self.every != 0:
            return None
        return self._step(model, args.device, self._loss_scale())

    def state_dict(self) -> dict[str, Any]:
        """State for a resumed run besides the model: the optimiser's state and the number of steps."""
        return {} if self._step is None else {"dev_step": self._step.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; called before training begins."""
        self._resumed = state.get("dev_step")


def _no_scale() -> None:
    """The loss scale of a trainer without one."""
