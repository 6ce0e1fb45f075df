"""The state of one forward pass with MOELoRA adapters: the rows' tasks and the routers' inputs."""

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
        hidden: The last input of the hidden states' size, (..., hidden), that a module got, and the module's block.
    """

    task_gates: nn.ModuleDict | None = None
    tasks: Tensor | None = None
    hidden: tuple[str, Tensor] | None = None
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

    def recall(self, block: str, path: str) -> Tensor:
        """Returns the last input of the hidden states' size of a module of the block.

        Raises:
            MiLoraError: If no module has been called with such an input yet.
        """
        if self.hidden is None or self.hidden[0] != block:
            raise MiLoraError(
                f"The router of {path} reads what an adapted module before it in {block} was given, and none was "
                "called yet that reads the hidden states. Adapt one that is, or leave this one out of target_modules."
            )
        return self.hidden[1]


class MoeLoraOwner(ContextOwner):
    """Owns the contexts of a model with MOELoRA adapters."""

    def __init__(self) -> None:
        super().__init__()
        # torch.compile cannot read a context variable, so the modules of a traced step share this object.
        self.traced = PassState()

    def state(self, path: str) -> PassState:
        """Returns the state of the running pass, for the module with this path.

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
