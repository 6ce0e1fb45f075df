"""Operators in plain torch, on a CPU and in Triton; imports nothing of the project but its errors."""

from milora.kernels.grouped_lora import add_grouped_lora, grouped_lora, grouped_lora_reference

__all__ = ["add_grouped_lora", "grouped_lora", "grouped_lora_reference"]
