"""Rows with different adapters and routes in one forward pass, for any tuner that stands on PEFT's LoRA layers."""

from milora.tuners.grouped.serving import BASE_ROW, GroupedServing, Share
from milora.tuners.grouped.stacks import AdapterStacks, ModuleStack, lora_layers

__all__ = ["BASE_ROW", "AdapterStacks", "GroupedServing", "ModuleStack", "Share", "lora_layers"]
