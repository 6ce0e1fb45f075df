"""What is in force while a model with MOELoRA adapters runs: the pass, the rows' tasks, what routers read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from milora_core.errors import MiLoraError


@dataclass
class ForwardPass:
    """One forward pass through the model.

    Attributes:
        task_gates: The adapters' task gates.
        tasks: (rows), the task of each row, or `None`.
        builds_graph: Whether the pass is one to train from.
        probabilities: Of each adapter, what the routers of its modules gave each expert, (..., experts) a module, if
            their load is to be balanced.
        ended: Whether what runs now is a recomputation.
    """

    task_gates: nn.ModuleDict
    tasks: Tensor | None
    builds_graph: bool
    probabilities: dict[str, list[Tensor]] = field(default_factory=dict)
    ended: bool = False
    _kept: dict[str, Tensor] = field(default_factory=dict)

    def gates(self, adapter: str) -> Tensor:
        """An adapter's gates of each row, (rows, experts)."""
        assert self.tasks is not None
        if torch.is_grad_enabled():
            # Anew in each module: under reentrant checkpointing no tensor with a graph may come from outside the block.
            return self.task_gates[adapter](self.tasks)  # type: ignore[no-any-return]
        if adapter not in self._kept:
            self._kept[adapter] = self.task_gates[adapter](self.tasks)
        return self._kept[adapter]

    def record(self, adapter: str, probabilities: Tensor) -> None:
        """Keeps a router's probabilities for the load-balancing loss, once a pass.

        Raises:
            MiLoraError: Under reentrant gradient checkpointing, whose first pass has no gradients.
        """
        if self.ended or not self.builds_graph:
            return
        if not torch.is_grad_enabled():
            raise MiLoraError(
                "MOELoRA's load-balancing loss has no gradient under reentrant gradient checkpointing: pass "
                "gradient_checkpointing_kwargs={'use_reentrant': False}, or set load_balancing_coef=0."
            )
        self.probabilities.setdefault(adapter, []).append(probabilities)


class _InForce(threading.local):
    """A thread's own: requests that several threads serve must not see each other's tasks or tokens."""

    def __init__(self) -> None:
        self.forward_pass: ForwardPass | None = None
        self.tasks: Tensor | None = None
        self.block: str | None = None
        self.hidden: Tensor | None = None


class Running:
    """Shared by all layers of a model."""

    def __init__(self) -> None:
        self._in_force = _InForce()

    # A copied or pickled model starts with nothing in force: passes belong to the model that ran them.
    def __getstate__(self) -> dict[str, Any]:
        return {"in_force": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    @property
    def current(self) -> ForwardPass | None:
        """The pass that is running in this thread."""
        return self._in_force.forward_pass

    @property
    def tasks(self) -> Tensor | None:
        """The tasks that [`Running.serving`] put in force."""
        return self._in_force.tasks

    def begin(self, forward_pass: ForwardPass) -> None:
        """Puts a pass in force."""
        self._in_force.forward_pass = forward_pass
        self._forget()

    def end(self) -> ForwardPass | None:
        """Ends the running pass, and returns it."""
        forward_pass, self._in_force.forward_pass = self._in_force.forward_pass, None
        self._forget()
        if forward_pass is not None:
            forward_pass.ended = True
        return forward_pass

    @contextmanager
    def resuming(self, forward_pass: ForwardPass | None) -> Iterator[None]:
        """In force again: the pass of an earlier forward, while one of its blocks is recomputed."""
        outer, self._in_force.forward_pass = self._in_force.forward_pass, forward_pass
        try:
            yield
        finally:
            self._in_force.forward_pass = outer

    @contextmanager
    def serving(self, tasks: Tensor | None) -> Iterator[None]:
        """In force: a task for each row; `None` changes nothing."""
        outer = self._in_force.tasks
        self._in_force.tasks = outer if tasks is None else tasks
        try:
            yield
        finally:
            self._in_force.tasks = outer

    # One place for the model, not one a block: a block's hidden states are kept no longer than the next block needs.

    def remember(self, block: str, hidden: Tensor) -> None:
        """Keeps a module's input of the hidden states' size, (..., hidden), for modules after it in its block."""
        self._in_force.block, self._in_force.hidden = block, hidden

    def recall(self, block: str, path: str) -> Tensor:
        """The last input of the hidden states' size that a module of the block was given.

        Raises:
            MiLoraError: If there was none yet.
        """
        hidden = self._in_force.hidden
        if hidden is None or self._in_force.block != block:
            raise MiLoraError(
                f"The router of {path} reads what an adapted module before it in {block} was given, and none was "
                "called yet that reads the hidden states. Adapt one that is, or leave this one out of target_modules."
            )
        return hidden

    def _forget(self) -> None:
        self._in_force.block = self._in_force.hidden = None
