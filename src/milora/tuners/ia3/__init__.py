"""Projected (IA)3 as a PEFT method."""

from milora.tuners.ia3.config import IA3ProjectedConfig
from milora.tuners.ia3.model import IA3ProjectedModel
from milora.tuners.registry import register

register("IA3_PROJECTED", IA3ProjectedConfig, IA3ProjectedModel, prefix="ia3_projected_")

__all__ = ["IA3ProjectedConfig", "IA3ProjectedModel"]
