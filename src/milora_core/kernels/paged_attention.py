"""Attention of single tokens over a paged cache on a CPU. The cache is read in place, without padding."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from milora_core.kernels.native import library
from milora_core.kernels.row_lora import KERNEL_DTYPES

MOST_SHARED = 16
"""Maximum number of heads per key-value head, as in the C file."""
MOST_SIZE = 512
"""Maximum size of a key or value, as in the C file."""


class PagedAttention:
    """The attention of one pass, for all layers: stores the new keys and values, then attends single tokens.

    Slot `page * page_tokens + i` of the cache is the i-th token of a page.

    Args:
        slots: (tokens), int64: the slots for the keys and values of the pass's tokens. The first `len(lengths)` tokens
            are single tokens of their texts.
        lengths: (rows), int64: number of tokens in each single token's text, including the token itself.
        pages: (rows, largest number of pages), int64: the pages of each text, in order.
        page_tokens: Tokens per page.

    Raises:
        RuntimeError: If there is no native kernel; see [`PagedAttention.serves`].
    """

    def __init__(self, slots: Tensor, lengths: Tensor, pages: Tensor, page_tokens: int) -> None:
        kernels = library()
        if kernels is None:
            raise RuntimeError("PagedAttention has no kernel here; ask PagedAttention.serves first.")
        self._functions = {dtype: getattr(kernels, f"attend_{name}") for dtype, name in KERNEL_DTYPES.items()}
        for function in self._functions.values():
            function.argtypes, function.restype = [ctypes.c_void_p] * 7, None
        self._tensors = [tensor.long().contiguous() for tensor in (slots, lengths, pages)]
        slots, lengths, pages = self._tensors
        self._plan = _Attention(
            rows=len(lengths),
            tokens=len(slots),
            page_tokens=page_tokens,
            pages_stride=pages.shape[1] if len(lengths) else 0,
            threads=torch.get_num_threads(),
            slots=slots.data_ptr(),
            lengths=lengths.data_ptr(),
            pages=pages.data_ptr(),
        )

    @staticmethod
    def serves(keys: Tensor, values: Tensor, heads: int) -> bool:
        """Whether there is a kernel for a cache on this machine.

        Args:
            keys: (slots, key-value heads, size of a key).
            values: (slots, key-value heads, size of a value).
            heads: Number of query heads.
        """
        return (
            keys.device.type == "cpu"
            and keys.dtype in KERNEL_DTYPES
            and values.dtype == keys.dtype
            and heads // keys.shape[1] <= MOST_SHARED
            and max(keys.shape[2], values.shape[2]) <= MOST_SIZE
            and library() is not None
        )

    def attend(
        self,
        keys: Tensor,
        values: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Stores the pass's keys and values in a layer's cache, and returns the single tokens' attention.

        Args:
            keys: (slots, key-value heads, size of a key), in a dtype that the kernel supports; changed in place.
            values: (slots, key-value heads, size of a value), in the same dtype; changed in place.
            query: (heads, tokens, size of a key), in the same dtype, with any strides.
            key: (key-value heads, tokens, size of a key), in the same dtype, with any strides.
            value: (key-value heads, tokens, size of a value), in the same dtype, with any strides.
            scaling: Factor applied to the scores.
            window: Maximum number of tokens that a token attends to, including itself; `None` for no limit.
            softcap: `c` in `c tanh(scores / c)`; `None` for no soft cap.

        Returns:
            (rows, heads, size of a value).
        """
        query, key, value = (part if part.stride(2) == 1 else part.contiguous() for part in (query, key, value))
        plan = self._plan
        plan.heads, plan.groups = query.shape[0], keys.shape[1]
        plan.key_size, plan.value_size = keys.shape[2], values.shape[2]
        plan.query_head, plan.query_token = query.stride(0), query.stride(1)
        plan.key_head, plan.key_token = key.stride(0), key.stride(1)
        plan.value_head, plan.value_token = value.stride(0), value.stride(1)
        plan.scaling, plan.window, plan.softcap = scaling, window or 0, softcap or 0.0
        output = query.new_empty(plan.rows, plan.heads, plan.value_size)
        pointers = [tensor.data_ptr() for tensor in (keys, values, query, key, value, output)]
        self._functions[keys.dtype](ctypes.addressof(plan), *pointers)
        return output


class _Attention(ctypes.Structure):
    """`struct attention` of the C file."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                *("rows", "tokens", "heads", "groups", "key_size", "value_size"),
                *("page_tokens", "pages_stride", "window", "threads"),
            )
        ),
        *((name, ctypes.c_void_p) for name in ("slots", "lengths", "pages")),
        *(
            (name, ctypes.c_int64)
            for name in ("query_token", "query_head", "key_token", "key_head", "value_token", "value_head")
        ),
        *((name, ctypes.c_float) for name in ("scaling", "softcap")),
    ]
