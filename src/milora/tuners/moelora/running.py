"""The state of one forward pass with MOELoRA adapters: the rows' tasks, what routers read, what they decided."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from milora.tuners.context import ContextOwner, running
from milora_core.errors import MiLoraError


@dataclass
class PassState:
    """See the module.

    Attributes:
        task_gates: The adapters' task gates.
        tasks: (rows), the task of each row, or `None`.
        builds_graph: Whether the pass is one to train from.
        probabilities: Of each adapter, what the routers of its modules gave each expert, (..., experts) a module, if
            their load is to be balanced.
        ended: Whether what runs now is a recomputation.
    """

    task_gates: nn.ModuleDict | None = None
    tasks: Tensor | None = None
    builds_graph: bool = False
    probabilities: dict[str, list[Tensor]] = field(default_factory=dict)
    ended: bool = False
    _block: str | None = None
    _hidden: Tensor | None = None
    _kept: dict[str, Tensor] = field(default_factory=dict)

    def gates(self, adapter: str) -> Tensor:
        """An adapter's gates of each row, (rows, experts)."""
        assert self.tasks is not None
        assert self.task_gates is not None
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

    def remember(self, block: str, hidden: Tensor) -> None:
        """Keeps a module's input of the hidden states' size, (..., hidden), for modules after it in its block."""
        self._block, self._hidden = block, hidden

    def recall(self, block: str, path: str) -> Tensor:
        """The last input of the hidden states' size that a module of the block was given.

        Raises:
            MiLoraError: If there was none yet.
        """
        if self._hidden is None or self._block != block:
            raise MiLoraError(
                f"The router of {path} reads what an adapted module before it in {block} was given, and none was "
                "called yet that reads the hidden states. Adapt one that is, or leave this one out of target_modules."
            )
        return self._hidden

    def end(self) -> None:
        """The forward pass has ended; what follows is a recomputation."""
        self.ended, self._block, self._hidden = True, None, None


class MoeLoraOwner(ContextOwner):
    """Whose contexts the passes of a model are."""

    def __init__(self) -> None:
        super().__init__()
        # torch.compile cannot read a context variable; the modules of a traced step follow each other in this object.
        self.traced = PassState()

    def state(self, path: str) -> PassState:
        """The running pass's.

        Args:
            path: The module that asks.

        Raises:
            RuntimeError: If none is running.
        """
        if torch.compiler.is_dynamo_compiling():
            return self.traced
        context = running(self)
        if context is None:
            raise RuntimeError(
                f"{path} was called directly, but its experts' weights are known only when the whole model is called. "
                "Call the model that get_peft_model returned."
            )
        state: PassState = context.prompts
        return state
