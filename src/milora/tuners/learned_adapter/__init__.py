"""Learned-Adapter as a PEFT method."""

from milora.tuners.learned_adapter.config import LearnedAdapterConfig
from milora.tuners.learned_adapter.model import LearnedAdapterModel
from milora.tuners.registry import register

register("LEARNED_ADAPTER", LearnedAdapterConfig, LearnedAdapterModel, prefix="learned_adapter_")

__all__ = ["LearnedAdapterConfig", "LearnedAdapterModel"]
