"""Tracks the prompts that filled a cache, through copies and rearrangements of its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from transformers import Cache

from milora.tuners.context import Prompts
from milora_core.errors import MiLoraError

MADE_BY = "_milora_prompts"
"""The attribute in which a cache keeps its [`Prompts`] or [`BARE`]. Copies of the cache keep it too."""

BARE = "backbone"
"""Marks a cache that the backbone filled while the adapters were disabled."""


CACHE_ARGUMENTS = ("past_key_values", "cache_params")
"""Names under which models take and return their cache; the second one is that of Mamba."""

OTHER_STATES = ("cache_params", "state")
"""Names under which some models take a state that is no `Cache` (xLSTM, RWKV)."""


def cache_of(values: Mapping[str, Any]) -> Cache | None:
    """The cache among a model's arguments or outputs."""
    found = (values.get(name) for name in CACHE_ARGUMENTS)
    return next((value for value in found if isinstance(value, Cache)), None)


def is_filled(cache: Cache | None) -> bool:
    """Whether a cache holds tokens, or the state that tokens left behind."""
    if cache is None:
        return False
    try:
        return int(cache.get_seq_length()) > 0
    except ValueError:  # A cache without attention layers (Mamba) has no length.
        return bool(cache.has_previous_state())


def check_state(arguments: Mapping[str, Any]) -> None:
    """Refuses a call that continues a state which does not tell its prompts.

    Raises:
        MiLoraError: If the arguments contain such a state.
    """
    for name in OTHER_STATES:
        state = arguments.get(name)
        if state is not None and not isinstance(state, Cache):
            raise MiLoraError(
                f"{name}, a {type(state).__name__}, does not tell which prompts filled it, so their route is unknown. "
                "Generate with use_cache=False."
            )


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
