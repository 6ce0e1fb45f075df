"""`PTuningV2Config`."""

from __future__ import annotations

from dataclasses import dataclass, field

from milora.tuners.prefix import PrefixConfig
from milora.tuners.registry import add_peft_type
from milora_core.errors import MiLoraError


@dataclass
class PTuningV2Config(PrefixConfig):
    """Configuration of P-tuning v2 (Liu et al. 2022, arXiv 2110.07602), the prefix-tuning of Li and Liang at any size.

    With its defaults, the MiLoRA paper's setting, it has 84.54M parameters on Llama-2 7B.

    Args:
        num_virtual_tokens: Keys and values that each layer gets.
        projection_dim: Length of the learned vectors that a layer's one projection makes keys and values of; `None`
            learns keys and values directly.

    Raises:
        MiLoraError: If `num_virtual_tokens` or `projection_dim` is below 1.
    """

    projection_dim: int | None = field(default=640, metadata={"help": "Length of the vectors before the projection."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("PTUNING_V2")
        if self.projection_dim is not None and self.projection_dim < 1:
            raise MiLoraError(f"projection_dim must be at least 1, or None; found {self.projection_dim}.")
