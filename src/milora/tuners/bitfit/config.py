"""`BitFitConfig`."""

from __future__ import annotations

from dataclasses import dataclass

from milora.tuners.attachment import AttachmentConfig
from milora.tuners.registry import add_peft_type
from milora_core.errors import MiLoraError


@dataclass
class BitFitConfig(AttachmentConfig):
    """Configuration of BitFit (Ben Zaken et al. 2022), in the projected form of the MiLoRA paper.

    Args:
        projection_dim: Length of the learned vector that is projected to a module's bias; `None` for the original
            method, which learns the bias directly.

    Raises:
        MiLoraError: If `projection_dim` is below 1.
    """

    projection_dim: int | None = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("BITFIT")
        if self.projection_dim is not None and self.projection_dim < 1:
            raise MiLoraError(f"projection_dim must be at least 1, or None; found {self.projection_dim}.")
