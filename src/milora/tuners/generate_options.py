"""Reads the options of transformers' `generate`: which pass is the prompt, how rows are expanded, and whether decode
steps are compiled. No other file reads them.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

from torch import nn
from transformers import CompileConfig, DynamicCache, GenerationConfig
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS

from milora_core.errors import MiLoraError

ALL_DEVICES = "_compile_all_devices"
"""transformers compiles on accelerators only, unless a `CompileConfig` has this private attribute set."""

OWN_PASS_OPTIONS = ("prompt_lookup_num_tokens", "assistant_early_exit", "prefill_chunk_size")
"""Options with which the first pass of a generation is not the prompt: it has candidate tokens too, or only a part."""

COMPILED_CALL = "_compiled_call"
"""The attribute in which transformers keeps a model's compiled call for later `generate` calls."""


def needs_own_pass(model: nn.Module, named: dict[str, Any]) -> bool:
    """Whether the first pass of a `generate` with these arguments is not the prompt."""
    own = named.get("generation_config") or getattr(model, "generation_config", None)
    return named.get("assistant_model") is not None or any(
        _value(named, own, option) is not None for option in OWN_PASS_OPTIONS
    )


def one_token(model: nn.Module) -> GenerationConfig:
    """Settings with which `generate` runs only the prefill."""
    own = getattr(model, "generation_config", None)
    special = {name: getattr(own, name, None) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    return GenerationConfig(max_new_tokens=1, do_sample=False, num_beams=1, **special)


def prompts_given(named: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a `generate` that define its prompts: `input_ids`, `inputs_embeds`, `attention_mask`."""
    given = {name: named.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask")}
    if named.get("inputs") is not None:
        given["input_ids"] = named["inputs"]
    return {name: value for name, value in given.items() if value is not None}


def inputs_given(model: nn.Module, named: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a `generate` with which another `generate` reads the same prompts.

    These are [`prompts_given`] and the other inputs of the model, such as `pixel_values` or `token_type_ids`: all that
    are neither options nor parameters of `generate`.
    """
    generate: Any = model.generate
    options = {*vars(GenerationConfig()), *inspect.signature(generate).parameters, "past_key_values"}
    others = {name: value for name, value in named.items() if name not in options and value is not None}
    return {**others, **prompts_given(named)}


def size_given(named: dict[str, Any]) -> tuple[int, int]:
    """(prompts, tokens) of a `generate` call, before beams and return sequences."""
    given = prompts_given(named)
    source = given.get("input_ids", given.get("inputs_embeds"))
    return (1, 1) if source is None else (int(source.shape[0]), int(source.shape[1]))


def compiled_settings(named: dict[str, Any]) -> dict[str, Any]:
    """Arguments with which `generate` compiles its decode steps as one graph, on any device.

    Args:
        named: The caller's arguments. A `cache_implementation` or `compile_config` among them is kept.

    Raises:
        MiLoraError: If another argument makes compiled steps impossible.
    """
    own = named.get("generation_config")
    if _value(named, own, "use_cache") is False or _value(named, own, "disable_compile"):
        raise MiLoraError("compiled=True needs the cache (use_cache=True) and no disable_compile=True.")
    cache = named.get("past_key_values")
    if isinstance(cache, DynamicCache):
        raise MiLoraError(
            "compiled=True needs a cache of fixed size: leave out past_key_values, or pass a StaticCache."
        )
    config = _value(named, own, "compile_config")
    # Copied: the caller's own configuration must not get the private attribute.
    config = CompileConfig(fullgraph=True) if config is None else copy.copy(config)
    setattr(config, ALL_DEVICES, True)
    settings: dict[str, Any] = {"compile_config": config}
    if cache is None:
        settings["cache_implementation"] = _value(named, own, "cache_implementation") or "static"
    return settings


def is_compiled_by_transformers(model: Any, named: dict[str, Any]) -> bool:
    """Whether `generate` with these arguments would compile its decode steps automatically.

    Args:
        model: The backbone.
        named: The caller's arguments.
    """
    own = named.get("generation_config") or getattr(model, "generation_config", None)
    config = _value(named, own, "compile_config")
    if _value(named, own, "disable_compile"):
        return False
    if model.device.type not in ("cuda", "xpu") and not getattr(config, ALL_DEVICES, None):
        return False
    cache = named.get("past_key_values")
    if cache is not None:
        return bool(getattr(cache, "is_compileable", False)) and type(cache) is not DynamicCache
    return _value(named, own, "cache_implementation") in ALL_STATIC_CACHE_IMPLEMENTATIONS


def forget_compiled_step(model: Any) -> None:
    """Removes the compiled call from a copy of a backbone. The call belongs to the original; the copy compiles its own.

    Args:
        model: The copy.
    """
    vars(model).pop(COMPILED_CALL, None)


def _value(named: dict[str, Any], config: Any, name: str) -> Any:
    value = named.get(name)
    return value if value is not None else getattr(config, name, None)
