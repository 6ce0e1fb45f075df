"""Backbones in 4 or 8 bits (QLoRA, Dettmers et al. 2023), with the option names of TRL's `ModelConfig`."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from trl import ModelConfig, get_quantization_config

from milora.training.arguments import DataArguments
from milora_core.errors import MiLoraError

PACKS = "support_avx512bf16_for_cpu"
"""The attribute of bitsandbytes' `Linear4bit` that says whether weights are packed for inference."""


def loading_arguments(data: DataArguments) -> dict[str, Any]:
    """The arguments of `from_pretrained` for the backbone of `data`; empty for an unquantised one.

    Computation uses `data.dtype`; `auto` means bfloat16.

    Raises:
        MiLoraError: If both widths are set, or bitsandbytes is not installed.
    """
    arguments: dict[str, Any] = {}
    if data.attn_implementation is not None:
        arguments["attn_implementation"] = data.attn_implementation
    if not (data.load_in_4bit or data.load_in_8bit):
        return arguments
    flag = "--load_in_4bit" if data.load_in_4bit else "--load_in_8bit"
    if data.load_in_4bit and data.load_in_8bit:
        raise MiLoraError("--load_in_4bit and --load_in_8bit exclude each other: remove one of them.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MiLoraError(f"{flag} needs bitsandbytes, which is not installed: pip install bitsandbytes.")
    config = ModelConfig(
        dtype="bfloat16" if data.dtype == "auto" else data.dtype,
        load_in_4bit=data.load_in_4bit,
        load_in_8bit=data.load_in_8bit,
        bnb_4bit_quant_type=data.bnb_4bit_quant_type,
        use_bnb_nested_quant=data.use_bnb_nested_quant,
        bnb_4bit_quant_storage=data.bnb_4bit_quant_storage,
    )
    arguments["quantization_config"] = get_quantization_config(config)
    if torch.cuda.is_available():
        # Each process has a whole backbone on its own device.
        arguments["device_map"] = {"": PartialState().local_process_index}
    return arguments


def keep_trainable(backbone: nn.Module) -> None:
    """Prevents bitsandbytes from packing 4-bit weights for inference on CPUs that multiply bfloat16.

    It packs at a layer's first forward pass without gradients, such as the evaluation before the first step. Packed
    weights pass no gradient to the layers below, not even in training mode, and packing fails if a layer's input size
    is not a multiple of the quantisation blocks. Other backbones are not changed.
    """
    for module in backbone.modules():
        if hasattr(module, PACKS):
            setattr(module, PACKS, False)
