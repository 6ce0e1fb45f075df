"""`PTuningV2Config`."""

from __future__ import annotations

from dataclasses import dataclass

from milora.tuners.prefix import PrefixConfig
from milora.tuners.registry import add_peft_type
from milora_core.errors import MiLoraError


@dataclass
class PTuningV2Config(PrefixConfig):
    """Configuration of P-tuning v2 (Liu et al. 2022, arXiv 2110.07602): prefix-tuning of Li and Liang for all sizes.

    The defaults are the MiLoRA paper's settings: 84.54M parameters on Llama-2 7B.

    Args:
        num_virtual_tokens: Number of extra keys and values of each layer.
        projection_dim: Length of the learned vectors. One projection per layer maps them to keys and values. `None`
            learns keys and values directly.

    Raises:
        MiLoraError: If `num_virtual_tokens` or `projection_dim` is below 1.
    """

    projection_dim: int | None = 640

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("PTUNING_V2")
        if self.projection_dim is not None and self.projection_dim < 1:
            raise MiLoraError(f"projection_dim must be at least 1, or None; found {self.projection_dim}.")
