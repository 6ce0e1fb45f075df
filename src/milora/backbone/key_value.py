"""How an attention module computes its keys and values, before their rotation by position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from milora.backbone.blocks import Block, out_features
from milora_core.errors import MiLoraError

INPUT_NORMS = ("input_layernorm", "ln_1", "self_attn_layer_norm", "operator_norm")
"""Names of the norm between a block's input and its attention."""

KEY_NORMS = ("k_norm", "k_layernorm")
"""Names of the norm of the keys."""


@dataclass(frozen=True)
class KeysAndValues:
    """The keys and values of an attention module.

    Attributes:
        heads: Number of key-value heads.
        head_dim: Size of a key and of a value of a head.
        project: (..., hidden) to keys and values, (..., heads * head_dim) each.
    """

    heads: int
    head_dim: int
    project: Callable[[Tensor], tuple[Tensor, Tensor]]

    @property
    def size(self) -> int:
        """Size of the keys, or of the values, of all heads together."""
        return self.heads * self.head_dim


def find_keys_and_values(attention: nn.Module, path: str) -> KeysAndValues:
    """The keys and values of an attention module, from separate modules or from one that also computes the queries.

    Raises:
        MiLoraError: If its layout is not known, as in multi-head latent attention.
    """
    head_dim = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    if isinstance(head_dim, int):
        for of_layout in (_separate, _thirds, _in_a_row, _by_head):
            found = of_layout(attention, head_dim)
            if found is not None:
                return found
    children = ", ".join(name for name, _ in attention.named_children())
    raise MiLoraError(
        f"Could not find how {path} ({type(attention).__name__}) computes its keys and values: looked for k_proj and "
        f"v_proj, c_attn, qkv_proj or query_key_value of known layouts, found {children}. Choose a method that adapts "
        "linear modules, such as MiLoRA."
    )


def project_keys_and_values(attention: nn.Module, path: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of tokens without a position, (batch, heads, tokens, head_dim) each.

    Args:
        attention: The attention module.
        path: Its path, for messages.
        hidden: The module's input for them, (batch, tokens, hidden).

    Raises:
        MiLoraError: If its keys and values are not found, or are normalised in an unknown way.
    """
    found = find_keys_and_values(attention, path)
    key, value = found.project(hidden)
    norm = _key_norm(attention)
    # A key norm covers all heads (OLMo 2) or each head separately.
    spans_heads = norm is not None and norm.weight.shape[-1] == found.size != found.head_dim
    if norm is not None and spans_heads:
        key = norm(key)
    key, value = (projected.reshape(*hidden.shape[:-1], found.heads, found.head_dim) for projected in (key, value))
    if norm is not None and not spans_heads:
        key = norm(key)
    return key.transpose(1, 2), value.transpose(1, 2)


def check_projection(attention: nn.Module, path: str) -> None:
    """Checks that [`project_keys_and_values`] supports a module.

    Raises:
        MiLoraError: If it does not.
    """
    found = find_keys_and_values(attention, path)
    norm = _key_norm(attention)
    weight = getattr(norm, "weight", None)
    known = norm is None or (isinstance(weight, Tensor) and weight.shape[-1] in (found.size, found.head_dim))
    if not known or hasattr(attention, "v_norm"):
        raise MiLoraError(
            f"{path} ({type(attention).__name__}) normalises its keys or values in an unknown way, so keys and values "
            "cannot be computed for soft tokens. Use P-tuning v2, which learns them directly."
        )


def find_input_norm(block: Block) -> str | None:
    """The path, relative to the block, of the norm between its input and its attention; `None` if there is none.

    Raises:
        MiLoraError: If the block has norms, but none with a known name.
    """
    children = [name for name, _ in block.module.named_children()]
    # OPT can have its norms after the sub-layers, with the same names; OLMo 2 names them by position.
    is_after = getattr(block.module, "do_layer_norm_before", True) is False
    if is_after or {"post_attention_layernorm", "post_feedforward_layernorm"} == {n for n in children if "norm" in n}:
        return None
    found = next((name for name in INPUT_NORMS if name in children), None)
    if found is None:
        raise MiLoraError(
            f"Could not find the norm before the attention of {block.path} ({type(block.module).__name__}): "
            f"looked for {', '.join(INPUT_NORMS)}, found {', '.join(children)}."
        )
    return found


def _key_norm(attention: nn.Module) -> Any:
    return next((norm for name in KEY_NORMS if isinstance(norm := getattr(attention, name, None), nn.Module)), None)


def _separate(attention: nn.Module, head_dim: int) -> KeysAndValues | None:
    """Separate modules."""
    key, value = getattr(attention, "k_proj", None), getattr(attention, "v_proj", None)
    if not isinstance(key, nn.Module) or not isinstance(value, nn.Module):
        return None
    size = out_features(key)
    if size % head_dim != 0 or out_features(value) != size:
        return None
    return KeysAndValues(size // head_dim, head_dim, lambda hidden: (key(hidden), value(hidden)))


def _thirds(attention: nn.Module, head_dim: int) -> KeysAndValues | None:
    """Queries, keys and values, a third each (GPT-2)."""
    fused = getattr(attention, "c_attn", None)
    size = getattr(attention, "split_size", None)
    if not isinstance(fused, nn.Module) or not isinstance(size, int) or out_features(fused) != 3 * size:
        return None
    return KeysAndValues(size // head_dim, head_dim, lambda hidden: _pair(fused(hidden).split(size, dim=-1)[1:]))


def _in_a_row(attention: nn.Module, head_dim: int) -> KeysAndValues | None:
    """All queries, then the keys and values, which may be fewer (Phi-3)."""
    fused = getattr(attention, "qkv_proj", None)
    config = getattr(attention, "config", None)
    heads = getattr(config, "num_key_value_heads", None)
    query_heads = getattr(config, "num_attention_heads", None)
    if not isinstance(fused, nn.Module) or not isinstance(heads, int) or not isinstance(query_heads, int):
        return None
    if out_features(fused) != (query_heads + 2 * heads) * head_dim:
        return None
    sizes = [query_heads * head_dim, heads * head_dim, heads * head_dim]
    return KeysAndValues(heads, head_dim, lambda hidden: _pair(fused(hidden).split(sizes, dim=-1)[1:]))


def _by_head(attention: nn.Module, head_dim: int) -> KeysAndValues | None:
    """Query, key and value of the first head, then of the second, and so on (GPT-NeoX)."""
    fused = getattr(attention, "query_key_value", None)
    heads = getattr(getattr(attention, "config", None), "num_attention_heads", None)
    if not isinstance(fused, nn.Module) or not isinstance(heads, int):
        return None
    if out_features(fused) != heads * 3 * head_dim:
        return None

    def project(hidden: Tensor) -> tuple[Tensor, Tensor]:
        by_head: Tensor = fused(hidden).reshape(*hidden.shape[:-1], heads, 3, head_dim)
        return _pair([of_all_heads.flatten(-2) for of_all_heads in by_head.unbind(-2)[1:]])

    return KeysAndValues(heads, head_dim, project)


def _pair(tensors: list[Tensor] | tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    key, value = tensors
    return key, value
