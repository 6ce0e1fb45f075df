"""Parallel-Adapter as a PEFT method."""

from milora.tuners.parallel_adapter.config import ParallelAdapterConfig
from milora.tuners.parallel_adapter.model import ParallelAdapterModel
from milora.tuners.registry import register

register("PARALLEL_ADAPTER", ParallelAdapterConfig, ParallelAdapterModel, prefix="parallel_adapter_")

__all__ = ["ParallelAdapterConfig", "ParallelAdapterModel"]
