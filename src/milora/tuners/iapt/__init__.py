"""IAPT as a PEFT method."""

from milora.tuners.iapt.config import IAPTConfig
from milora.tuners.iapt.model import IAPTModel
from milora.tuners.registry import register

register("IAPT", IAPTConfig, IAPTModel, prefix="iapt_")

__all__ = ["IAPTConfig", "IAPTModel"]
