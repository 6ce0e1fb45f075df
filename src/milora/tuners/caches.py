"""Tracks the prompts that filled a cache, through copies and rearrangements of its rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from transformers import Cache

from milora.tuners.context import Prompts

MADE_BY = "_milora_prompts"
"""The attribute in which a cache keeps its [`Prompts`] or [`BARE`]. Copies of the cache keep it too."""

BARE = "backbone"
"""Marks a cache that the backbone filled while the adapters were disabled."""


def made_by(cache: Cache | None) -> Any:
    """The [`Prompts`] that filled a cache, [`BARE`], or `None` if unknown."""
    return None if cache is None else getattr(cache, MADE_BY, None)


def remember(cache: Cache, prompts: Prompts | str) -> None:
    """Records the prompts that filled a cache, or [`BARE`]."""
    if getattr(cache, MADE_BY, None) is not prompts:
        setattr(cache, MADE_BY, prompts)


def _follow_rows(name: str, rows_of: Callable[[int, Any], list[int]]) -> None:
    """Makes a method of transformers' `Cache` that rearranges rows also rearrange the cache's prompts.

    Args:
        name: Name of the method, which has one argument.
        rows_of: Maps the number of rows and that argument to the source row of each new row.
    """
    original = getattr(Cache, name)

    @wraps(original)
    def moved(self: Cache, argument: Any) -> Any:
        result = original(self, argument)
        prompts = made_by(self)
        # A running generation only reorders the beams of one prompt, so its prompts stay the same.
        if isinstance(prompts, Prompts) and not prompts.use.is_running:
            remember(self, prompts.pick(rows_of(prompts.rows, argument)))
        return result

    setattr(Cache, name, moved)


def _selected(rows: int, indices: Any) -> list[int]:
    return torch.arange(rows)[torch.as_tensor(indices).cpu()].reshape(-1).tolist()


def _repeated(rows: int, times: int) -> list[int]:
    return [row for row in range(rows) for _ in range(times)]


_follow_rows("reorder_cache", _selected)
_follow_rows("batch_select_indices", _selected)
_follow_rows("batch_repeat_interleave", _repeated)
