"""The attention of a packed pass over the paged cache, called by transformers' models.

`AttentionInterface.register` is transformers' public interface for custom attention functions. Each layer passes the
queries, keys and values of all tokens of the pass. The function stores the keys and values, then computes the attention
of all single tokens in one call, and that of prompt chunks one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from milora.serving.engine.cache import KeyValueCache
from milora_core.errors import MiLoraError
from milora_core.kernels.paged_attention import PagedAttention

NAME = "milora_packed"
"""The attention's name in transformers' `AttentionInterface`."""

UNSUPPORTED = ("s_aux", "position_bias")
"""Unsupported arguments of attention layers that change the result: learned sinks and position biases."""


@dataclass(frozen=True)
class Piece:
    """Adjacent tokens of one text in a packed pass.

    Args:
        start: Index of the first token in the pass.
        count: Number of tokens.
        past: Number of the text's tokens that the cache already has.
        pages: The text's pages, including those of its new tokens.
    """

    start: int
    count: int
    past: int
    pages: Sequence[int]


@dataclass(frozen=True)
class Options:
    """A layer's attention options.

    Args:
        scaling: Factor applied to the products of queries and keys.
        window: Number of tokens that a token attends to, including itself; `None` for itself and all earlier tokens.
        softcap: `c` in `c tanh(scores / c)`; `None` for no soft cap.
    """

    scaling: float
    window: int | None
    softcap: float | None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, is_single: bool = False
    ) -> Tensor:
        """Attention of `query` (rows, heads, tokens, size) over `key` and `value` (rows, fewer heads, columns, size).

        `mask` is (tokens, columns), bool. Without a mask, attention is causal; with `is_single`, it covers all columns.
        Returns (rows, heads, tokens, size of a value).
        """
        groups = query.shape[1] // key.shape[1]
        is_causal = mask is None and not is_single
        if self.softcap is None:
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=is_causal, scale=self.scaling, enable_gqa=groups > 1
            )
        scores = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3) * self.scaling
        scores = torch.tanh(scores / self.softcap) * self.softcap
        if is_causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        shares = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        return shares @ value.repeat_interleave(groups, dim=1)


class PackedAttention:
    """The cache slots that the tokens of one pass read and write.

    On a CPU with the native kernel, single tokens read their pages in place. Otherwise the pages are gathered first.

    Args:
        cache: The cache.
        pieces: The pieces in token order, single tokens first.
    """

    def __init__(self, cache: KeyValueCache, pieces: Sequence[Piece]) -> None:
        self._cache = cache
        self._device = cache.keys[0].device
        self._singles = [piece for piece in pieces if piece.count == 1]
        chunks = [(piece, self._slots(piece.pages, piece.past + piece.count)) for piece in pieces if piece.count > 1]
        self._chunks = [(piece, slots.to(self._device)) for piece, slots in chunks]
        size = cache.pool.page_tokens
        singles = [piece.pages[piece.past // size] * size + piece.past % size for piece in self._singles]
        written = [torch.tensor(singles, dtype=torch.long), *(slots[piece.past :] for piece, slots in chunks)]
        self._written = torch.cat(written).to(self._device)
        self._masks: dict[Any, Tensor | None] = {}
        self._native: PagedAttention | None = None
        self._read: Tensor | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        """Stores the new keys and values and attends to the cache.

        Args:
            layer: The layer's index in the cache.
            query: (1, heads, tokens, size of a key).
            key: (1, key-value heads, tokens, size of a key).
            value: (1, key-value heads, tokens, size of a value).
            options: The layer's options.

        Returns:
            (1, tokens, heads, size of a value).
        """
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        outputs = []
        if self._singles and query.dtype == keys.dtype and PagedAttention.serves(keys, values, query.shape[1]):
            if self._native is None:
                self._native = self._prepared()
            attended = self._native.attend(
                keys,
                values,
                query[0],
                key[0],
                value[0],
                scaling=options.scaling,
                window=options.window,
                softcap=options.softcap,
            )
            outputs.append(attended)
        else:
            keys.index_copy_(0, self._written, key[0].transpose(0, 1))
            values.index_copy_(0, self._written, value[0].transpose(0, 1))
            if self._singles:
                outputs.append(self._attend_singles(query[0, :, : len(self._singles)], keys, values, options))
        for piece, slots in self._chunks:
            of_piece = slice(piece.start, piece.start + piece.count)
            if piece.past:
                all_keys, all_values = (cached.index_select(0, slots).transpose(0, 1) for cached in (keys, values))
            else:
                all_keys, all_values = key[0, :, of_piece], value[0, :, of_piece]
            mask = self._chunk_mask(piece, options.window)
            of_chunk = options.attend(query[:, :, of_piece], all_keys[None], all_values[None], mask)
            outputs.append(of_chunk[0].transpose(0, 1))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None]

    def _slots(self, pages: Sequence[int], tokens: int) -> Tensor:
        """(tokens), on the CPU: the slots of a text's first tokens."""
        size = self._cache.pool.page_tokens
        of_pages = torch.tensor(pages[: -(-tokens // size)])
        return (of_pages[:, None] * size + torch.arange(size)).flatten()[:tokens]

    def _prepared(self) -> PagedAttention:
        longest = max(len(piece.pages) for piece in self._singles)
        pages = [[*piece.pages, *[0] * (longest - len(piece.pages))] for piece in self._singles]
        lengths = torch.tensor([piece.past + 1 for piece in self._singles])
        return PagedAttention(self._written, lengths, torch.tensor(pages), self._cache.pool.page_tokens)

    def _attend_singles(self, query: Tensor, keys: Tensor, values: Tensor, options: Options) -> Tensor:
        lengths = [piece.past + 1 for piece in self._singles]
        longest = max(lengths)
        if self._read is None:
            read = [self._slots(piece.pages, piece.past + 1) for piece in self._singles]
            # Pads each row with one of the row's own slots: other slots may hold NaN, and 0 * NaN is NaN.
            padded = [functional.pad(slots, (0, longest - len(slots)), value=int(slots[-1])) for slots in read]
            self._read = torch.cat(padded).to(self._device)
        of_rows = [
            cached.index_select(0, self._read).view(len(lengths), longest, *cached.shape[1:]).transpose(1, 2)
            for cached in (keys, values)
        ]
        key = ("singles", options.window)
        if key not in self._masks:
            places, ends = torch.arange(longest), torch.tensor(lengths)[:, None]
            seen = places < ends
            if options.window is not None:
                seen &= places >= ends - options.window
            self._masks[key] = None if bool(seen.all()) else seen[:, None, None].to(self._device)
        queries = query.transpose(0, 1)[:, :, None]
        return options.attend(queries, of_rows[0], of_rows[1], self._masks[key], is_single=True)[:, :, 0]

    def _chunk_mask(self, piece: Piece, window: int | None) -> Tensor | None:
        """(tokens, cached and new tokens), bool; `None` for causal attention without cached tokens."""
        total = piece.past + piece.count
        if not piece.past and (window is None or total <= window):
            return None
        key = (piece.start, window if window is not None and total > window else None)
        if key not in self._masks:
            queries = torch.arange(piece.past, total)[:, None]
            places = torch.arange(total)
            seen = places <= queries
            if window is not None:
                seen &= places > queries - window
            self._masks[key] = seen.to(self._device)
        return self._masks[key]


_running: ContextVar[PackedAttention] = ContextVar("milora_packed_attention")


@contextmanager
def attending(attention: PackedAttention) -> Iterator[None]:
    """Inside this context, models with the attention [`NAME`] use `attention`."""
    token = _running.set(attention)
    try:
        yield
    finally:
        _running.reset(token)


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers' attention layers call; see `AttentionInterface`.

    Raises:
        MiLoraError: If a layer passes an unsupported argument.
    """
    unknown = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if unknown or attention_mask is not None:
        raise MiLoraError(f"{type(module).__name__} asks for {', '.join(unknown) or 'a mask'}, which is not supported.")
    options = Options(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    return _running.get().attend(module.layer_idx, query, key, value, options), None


AttentionInterface.register(NAME, packed_attention)
