"""`MoeLoraConfig`."""

from __future__ import annotations

from dataclasses import dataclass

from milora.tuners.attachment import AttachmentConfig
from milora.tuners.registry import add_peft_type
from milora_core.errors import MiLoraError

GATES = ("token", "task")


@dataclass
class MoeLoraConfig(AttachmentConfig):
    """Configuration of MOELoRA: the MiLoRA paper's baseline (`gate="token"`) or the original method (Liu et al. 2023,
    `gate="task"`).

    Args:
        r: Rank of a module's LoRA, divided evenly among its experts. By default 8 experts have rank 4 each.
        lora_alpha: The sum of the experts is scaled by `lora_alpha / r`; `None` means `2 * r`.
        num_experts: Number of experts of a module.
        top_k: Number of experts that each token uses (`gate="token"`).
        lora_dropout: Dropout probability of the experts' input. The router's input has no dropout.
        gate: `token`: a router in every module selects experts for each token. `task`: the task of a row determines the
            weights of all experts, with one task embedding and one gate for the whole model.
        num_tasks: Number of tasks (`gate="task"`).
        task_embedding_dim: Size of a task's embedding (`gate="task"`).

    Raises:
        MiLoraError: If a value is unknown or out of range, or `r` cannot be divided evenly.
    """

    r: int = 32
    lora_alpha: int | None = None
    num_experts: int = 8
    top_k: int = 4
    lora_dropout: float = 0.0
    gate: str = "token"
    num_tasks: int | None = None
    task_embedding_dim: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("MOELORA")
        if self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
        if self.gate not in GATES:
            raise MiLoraError(f"Unknown gate {self.gate!r}; choose one of {list(GATES)}.")
        if self.num_experts < 1 or self.r < 1 or self.r % self.num_experts != 0:
            raise MiLoraError(
                f"r must be a multiple of num_experts; found r={self.r} and num_experts={self.num_experts}."
            )
        if not 0 <= self.lora_dropout < 1:
            raise MiLoraError(f"lora_dropout must lie in [0, 1); found {self.lora_dropout}.")
        if self.gate == "token":
            if not 1 <= self.top_k <= self.num_experts:
                raise MiLoraError(f"top_k must lie between 1 and num_experts, {self.num_experts}; found {self.top_k}.")
        elif self.num_tasks is None or self.num_tasks < 1:
            raise MiLoraError(f"gate='task' needs num_tasks, the number of tasks; found {self.num_tasks}.")
        elif self.task_embedding_dim < 1:
            raise MiLoraError(f"task_embedding_dim must be at least 1; found {self.task_embedding_dim}.")
