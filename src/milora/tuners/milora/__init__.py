"""MiLoRA as a PEFT method."""

from milora.tuners.milora.config import MiLoraConfig
from milora.tuners.milora.model import MiLoraModel
from milora.tuners.registry import register

register("MILORA", MiLoraConfig, MiLoraModel, prefix="lora_")

__all__ = ["MiLoraConfig", "MiLoraModel"]
