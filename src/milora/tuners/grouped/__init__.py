"""Rows with different adapters and routes in one forward pass, for any tuner that stands on PEFT's LoRA layers."""

from milora.tuners.grouped.naming import BASE_ROW, names_of_rows, rows_by_adapter
from milora.tuners.grouped.serving import GroupedServing, Share
from milora.tuners.grouped.stacks import AdapterStacks, ModuleStack

__all__ = [
    "BASE_ROW",
    "AdapterStacks",
    "GroupedServing",
    "ModuleStack",
    "Share",
    "names_of_rows",
    "rows_by_adapter",
]
