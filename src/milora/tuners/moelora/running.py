"""The state of one forward pass with MOELoRA adapters: the rows' tasks, the routers' inputs and their decisions."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from milora.tuners.context import ContextOwner, running
from milora_core.errors import MiLoraError


@dataclass
class PassState:
    """The state of one forward pass.

    Attributes:
        task_gates: The adapters' task gates.
        tasks: (rows), the task of each row, or `None`.
        builds_graph: Whether gradients are enabled in the pass.
        probabilities: Adapter -> the experts' probabilities in each module, (..., experts), for the load-balancing
            loss.
        ended: Whether the pass has ended, so a block that runs now is recomputed.
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
        """Returns an adapter's gates of each row, (rows, experts)."""
        assert self.tasks is not None
        assert self.task_gates is not None
        if torch.is_grad_enabled():
            # Computed in each module: reentrant checkpointing allows no tensor with a graph from outside the block.
            return self.task_gates[adapter](self.tasks)  # type: ignore[no-any-return]
        if adapter not in self._kept:
            self._kept[adapter] = self.task_gates[adapter](self.tasks)
        return self._kept[adapter]

    def record(self, adapter: str, probabilities: Tensor) -> None:
        """Keeps a router's probabilities for the load-balancing loss, once per pass.

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
        """Keeps a module's input of the hidden states' size, (..., hidden), for later modules of its block."""
        self._block, self._hidden = block, hidden

    def recall(self, block: str, path: str) -> Tensor:
        """Returns the last input of the hidden states' size of a module of the block.

        Raises:
            MiLoraError: If no module has been called with such an input yet.
        """
        if self._hidden is None or self._block != block:
            raise MiLoraError(
                f"The router of {path} reads what an adapted module before it in {block} was given, and none was "
                "called yet that reads the hidden states. Adapt one that is, or leave this one out of target_modules."
            )
        return self._hidden

    def end(self) -> None:
        """Marks the end of the forward pass. Later calls are recomputations."""
        self.ended, self._block, self._hidden = True, None, None


class MoeLoraOwner(ContextOwner):
    """Owns the contexts of a model with MOELoRA adapters."""

    def __init__(self) -> None:
        super().__init__()
        # torch.compile cannot read a context variable, so the modules of a traced step share this object.
        self.traced = PassState()

    def state(self, path: str) -> PassState:
        """Returns the state of the running pass.

        Args:
            path: Path of the calling module, for the message.

        Raises:
            RuntimeError: If no pass is running.
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
