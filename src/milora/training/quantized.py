"""Backbones in 4 or 8 bits (QLoRA, Dettmers et al. 2023), by the names that TRL's `ModelConfig` has for it."""

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
    """What `from_pretrained` is to be given for the backbone that `data` describes; empty for an ordinary one.

    What is computed is in `data.dtype`, for `auto` in bfloat16.

    Raises:
        MiLoraError: If both widths are asked for, or bitsandbytes is not installed.
    """
    arguments: dict[str, Any] = {}
    if data.attn_implementation is not None:
        arguments["attn_implementation"] = data.attn_implementation
    if not (data.load_in_4bit or data.load_in_8bit):
        return arguments
    flag = "--load_in_4bit" if data.load_in_4bit else "--load_in_8bit"
    if data.load_in_4bit and data.load_in_8bit:
        raise MiLoraError("--load_in_4bit and --load_in_8bit exclude each other: leave one of them out.")
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
        # Each process has a whole backbone on a device of its own.
        arguments["device_map"] = {"": PartialState().local_process_index}
    return arguments


def keep_trainable(backbone: nn.Module) -> None:
    """Keeps bitsandbytes from packing 4-bit weights for inference on CPUs that multiply bfloat16.

    It does so at a layer's first forward pass without gradients, such as the evaluation before the first step. Packed
    weights pass no gradient on to the layers below, in training mode neither, and cannot be made where a layer's inputs
    are no multiple of the quantisation's blocks. Other backbones are left as they are.
    """
    for module in backbone.modules():
        if hasattr(module, PACKS):
            setattr(module, PACKS, False)
