"""Operators in plain torch, on a CPU and in Triton; imports nothing of the project but its errors."""

from milora.kernels.grouped_lora import add_grouped_lora, grouped_lora, grouped_lora_reference
from milora.kernels.grouped_lora_cpu import PackedRows

__all__ = ["PackedRows", "add_grouped_lora", "grouped_lora", "grouped_lora_reference"]
