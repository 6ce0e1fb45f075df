"""`IA3ProjectedConfig`."""

from __future__ import annotations

from dataclasses import dataclass

from milora.tuners.attachment import AttachmentConfig
from milora.tuners.registry import add_peft_type
from milora_core.errors import MiLoraError


@dataclass
class IA3ProjectedConfig(AttachmentConfig):
    """Configuration of (IA)3 (Liu et al. 2022), in the projected form of the MiLoRA paper.

    The name differs from PEFT's IA3. With `projection_dim=None` it is the same method on other modules.

    Args:
        projection_dim: Length of the learned vector that is projected to a module's factors; `None` for the original
            method, which learns the factors directly.
        target_modules: `None` for the paper's Q, K and U, by their names in known architectures. If they are part of a
            fused module (query, key and value; gate and up), the whole module is adapted.

    Raises:
        MiLoraError: If `projection_dim` is below 1.
    """

    projection_dim: int | None = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("IA3_PROJECTED")
        if self.projection_dim is not None and self.projection_dim < 1:
            raise MiLoraError(f"projection_dim must be at least 1, or None; found {self.projection_dim}.")
