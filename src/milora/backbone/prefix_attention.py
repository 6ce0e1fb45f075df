"""Extra keys and values in front of a layer's own, which every query attends to: the only file that changes attention.

They are joined to the keys and values just before attention is computed, so cache, positions, beams and padding do not
change. transformers has a public interface for this (`AttentionInterface`): a layer's configuration selects our
implementation, which joins the prefix, widens the mask, and calls the layer's original implementation. For layers
without a prefix it only calls the original.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from milora_core.errors import MiLoraError

WITH_PREFIX = {"sdpa": "sdpa_with_prefix", "eager": "eager_with_prefix"}
"""The implementations that support a prefix, and their names with one."""

_FUNCTIONS = "ALL_ATTENTION_FUNCTIONS"
_EAGER = "eager_attention_forward"
"""The names of the table of implementations and of the eager one in transformers' model files."""


class PrefixSource:
    """Provides an attention module's prefix; a child of the module, so it is copied with it."""

    def prefix(self, attention: nn.Module, batch: int) -> tuple[Tensor, Tensor] | None:
        """The extra keys and values of a call.

        Args:
            attention: The attention module that is running.
            batch: Rows of the call.

        Returns:
            Keys and values, (batch, key-value heads, prefix, head_dim) each, in any floating-point type, rotated by
            no position; or `None` for none.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its prefix is.")


def check_prefix_support(attention: nn.Module, path: str) -> None:
    """Checks that an attention module can be given a prefix.

    Raises:
        MiLoraError: If it does not compute attention by transformers' interface, or by another implementation than
            sdpa and eager.
    """
    file = _model_file(attention)
    if file is None or not hasattr(getattr(attention, "config", None), "_attn_implementation"):
        raise MiLoraError(
            f"{path} ({type(attention).__name__}) computes attention in its own way and not by transformers' "
            "AttentionInterface, so no keys and values can be put in front of its own. Choose a method that adapts "
            "linear modules, such as MiLoRA, or a backbone such as Llama, Qwen, Gemma, Phi-3, OPT or GPT-2."
        )
    implementation = implementation_of(attention)
    if implementation not in WITH_PREFIX and implementation not in WITH_PREFIX.values():
        raise MiLoraError(
            f"{path} computes attention by {implementation!r}, which cannot be given extra keys and values. "
            f"{' and '.join(WITH_PREFIX)} can: load the backbone with attn_implementation='{next(iter(WITH_PREFIX))}'."
        )


def implementation_of(attention: nn.Module) -> str | None:
    """The name of the implementation that an attention module uses."""
    name: str | None = attention.config._attn_implementation  # type: ignore[union-attr, assignment]
    return name


def allow_prefix(attention: nn.Module) -> None:
    """Has an attention module, and those that share its configuration, ask for a prefix from now on."""
    name = implementation_of(attention)
    if name in WITH_PREFIX:
        _choose(attention.config, WITH_PREFIX[name])


def disallow_prefixes(model: nn.Module) -> None:
    """Undoes [`allow_prefix`] for all modules of a model."""
    own_names = {with_prefix: own for own, with_prefix in WITH_PREFIX.items()}
    for module in model.modules():
        config = getattr(module, "config", None)
        name = getattr(config, "_attn_implementation", None)
        if name in own_names:
            _choose(config, own_names[name])


def _choose(config: Any, implementation: str) -> None:
    # A mapping, because a plain name would also apply to the other parts of a composite model.
    config._attn_implementation = {"": implementation}


def _model_file(attention: nn.Module) -> Any:
    """The model file that an attention module comes from, if it uses the interface."""
    files = (sys.modules.get(base.__module__) for base in type(attention).__mro__)
    return next((file for file in files if hasattr(file, _FUNCTIONS)), None)


def _attend(
    own_name: str,
    attention: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """An implementation for `AttentionInterface`.

    Args:
        own_name: The implementation that computes the attention.
        attention: The module.
        query: (batch, heads, queries, head_dim).
        key: (batch, key-value heads, keys, head_dim), including the cache.
        value: As `key`.
        attention_mask: (batch, 1 or heads, queries, keys), bool or added to the scores; `None` where none is needed.
        *args: Passed on.
        **kwargs: Passed on.
    """
    file = _model_file(attention)
    own: Callable[..., Any] = getattr(file, _FUNCTIONS).get(own_name, getattr(file, _EAGER, None))
    for source in attention.children():
        prefix = source.prefix(attention, key.shape[0]) if isinstance(source, PrefixSource) else None
        if prefix is not None:
            if attention_mask is None and own_name == "sdpa":
                attention_mask = _causal_mask(attention, query, key, kwargs.get("is_causal"))
            attention_mask = _widened(attention_mask, prefix[0].shape[2])
            key, value = (
                torch.cat([extra.to(device=of_layer.device, dtype=of_layer.dtype), of_layer], dim=2)
                for extra, of_layer in zip(prefix, (key, value), strict=True)
            )
    return own(attention, query, key, value, attention_mask, *args, **kwargs)


def _causal_mask(attention: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None) -> Tensor | None:
    """The mask that scaled dot-product attention omits: (1, 1, queries, keys), bool, or `None` for no mask.

    transformers omits it for a single query, and if the first query is at the first key: without a cache, or with an
    empty dynamic or static cache (its keys after the last query are not filled yet).
    """
    queries, keys = query.shape[2], key.shape[2]
    causal = getattr(attention, "is_causal", True) if is_causal is None else is_causal
    if queries == 1 or not causal:
        return None
    return torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()[None, None]


def _widened(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """The mask with columns for the prefix in front, which every query attends to."""
    if attention_mask is None:
        return None
    shape = (*attention_mask.shape[:-1], length)
    visible = attention_mask.new_ones(shape) if attention_mask.dtype == torch.bool else attention_mask.new_zeros(shape)
    return torch.cat([visible, attention_mask], dim=-1)


for _own, _with_prefix in WITH_PREFIX.items():
    AttentionInterface.register(_with_prefix, partial(_attend, _own))
    AttentionMaskInterface.register(_with_prefix, AttentionMaskInterface()[_own])
