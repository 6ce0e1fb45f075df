"""Rows with different adapters and routes in one forward pass, for any tuner based on PEFT's LoRA layers."""

from milora.tuners.grouped.owner import GroupedOwner
from milora.tuners.grouped.plan import GroupedPlan, Share, check_names, checked_names, names_of_rows, rows_by_adapter
from milora.tuners.grouped.stacks import ModuleStack

__all__ = [
    "GroupedOwner",
    "GroupedPlan",
    "ModuleStack",
    "Share",
    "check_names",
    "checked_names",
    "names_of_rows",
    "rows_by_adapter",
]
