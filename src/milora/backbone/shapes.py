"""Backbones of published sizes with random weights, for counting and timing without a download."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GemmaConfig, LlamaConfig

from milora.backbone.bundled import TINY_BACKBONE
from milora_core.errors import MiLoraError, did_you_mean


def _llama_2(hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int) -> Any:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )


def _tinyllama() -> Any:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )


def _gemma_2b() -> Any:
    return GemmaConfig(
        vocab_size=256000,
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=8192,
    )


SHAPES: Mapping[str, Callable[[], Any]] = {
    "llama-2-7b": lambda: _llama_2(4096, 11008, 32, 32, 32),
    "llama-2-13b": lambda: _llama_2(5120, 13824, 40, 40, 40),
    "llama-2-70b": lambda: _llama_2(8192, 28672, 80, 64, 8),
    "gemma-2b": _gemma_2b,
    "tinyllama-1.1b": _tinyllama,
}
"""The configuration of each shape (Touvron et al. 2023, tables 1 and 2; Gemma Team 2024; Zhang et al. 2024)."""


def shape_config(name: str | Path) -> Any:
    """The transformers configuration of a named shape, of the bundled backbone (`tiny`), or of a backbone's folder.

    Raises:
        MiLoraError: If there is no such shape or folder; the message lists the shapes.
    """
    if str(name) in SHAPES:
        return SHAPES[str(name)]()
    folder = TINY_BACKBONE if str(name) == "tiny" else Path(name).expanduser()
    if (folder / "config.json").is_file():
        return AutoConfig.from_pretrained(str(folder))
    raise MiLoraError(
        f"There is no backbone shape {str(name)!r}: give one of {', '.join(SHAPES)}, tiny, or a folder with a "
        f"config.json{did_you_mean(str(name), SHAPES)}"
    )


def build(
    name: str | Path, device: str | torch.device = "meta", dtype: torch.dtype = torch.float32, **settings: Any
) -> Any:
    """A causal language model of a shape in eval mode, with random weights, or without weights and memory on `meta`.

    Args:
        name: As for [`shape_config`].
        device: Device of its weights: `meta`, `cpu`, `cuda`.
        dtype: Of the weights.
        **settings: Fields of the configuration to change, such as `num_hidden_layers=2`.

    Raises:
        MiLoraError: If there is no such shape, or a setting is not a field of its configuration.
    """
    config = shape_config(name)
    for field, value in settings.items():
        if not hasattr(config, field):
            raise MiLoraError(f"{type(config).__name__} has no field {field!r}{did_you_mean(field, config.to_dict())}")
        setattr(config, field, value)
    return from_config(config, device, dtype)


def from_config(config: Any, device: str | torch.device = "meta", dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model with random weights from a transformers configuration; see [`build`]."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
