"""Operators in plain torch, in C for CPUs, and in Triton. This package imports only the project's errors."""

from milora_core.kernels.grouped_lora import add_grouped_lora, grouped_lora, grouped_lora_reference
from milora_core.kernels.grouped_lora_cpu import OneToken, one_token
from milora_core.kernels.row_lora import KERNEL_DTYPES, Piece, RowLora

__all__ = [
    "KERNEL_DTYPES",
    "OneToken",
    "Piece",
    "RowLora",
    "add_grouped_lora",
    "grouped_lora",
    "grouped_lora_reference",
    "one_token",
]
