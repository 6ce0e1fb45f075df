"""The paged key-value cache. Texts share pages, and later prompts with the same prefix reuse them."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from milora_core.errors import MiLoraError


class PagePool:
    """Allocates the cache's pages and finds pages by their tokens.

    The key of a full page consists of its tokens, the tokens before it, and a salt that identifies the weights (an
    adapter and its route, or the bare backbone). Keys contain the tokens themselves, not hashes, so no two prompts
    collide. Pages without holders stay cached until their space is needed; the page released first is evicted first.

    Args:
        pages: Number of pages.
        page_tokens: Tokens per page.
    """

    def __init__(self, pages: int, page_tokens: int) -> None:
        self.pages = pages
        self.page_tokens = page_tokens
        self._free = deque(range(pages))
        self._holders = [0] * pages
        self._known: dict[Hashable, int] = {}
        self._key_of: dict[int, Hashable] = {}
        self._node_of: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._nodes = 0

    @property
    def available(self) -> int:
        """Number of pages that can be taken now."""
        return len(self._free) + len(self._idle)

    @property
    def idle(self) -> int:
        """Number of cached pages without a holder."""
        return len(self._idle)

    def take(self) -> int:
        """Takes a page, with undefined contents, for one holder. At least one page must be [`PagePool.available`]."""
        if self._free:
            page = self._free.popleft()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._known[self._key_of.pop(page)], self._node_of[page]
        self._holders[page] = 1
        return page

    def share(self, page: int) -> None:
        """Adds a holder to a page."""
        if self._holders[page] == 0:
            del self._idle[page]
        self._holders[page] += 1

    def is_shared(self, page: int) -> bool:
        """Whether a page has several holders."""
        return self._holders[page] > 1

    def release(self, pages: Sequence[int]) -> None:
        """Removes one holder from each of a text's pages, which are given in text order."""
        for page in reversed(pages):  # More prompts share the beginning, so the end is evicted first.
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def match(self, salt: Hashable, tokens: Sequence[int], limit: int) -> tuple[list[int], Hashable]:
        """Finds the cached pages of a prefix of some tokens. Call [`PagePool.share`] on them before taking other pages.

        Args:
            salt: Identifies the weights that compute the tokens.
            tokens: The tokens.
            limit: Maximum number of tokens to look up.

        Returns:
            The pages, and the parent node of the page after them.
        """
        size, node = self.page_tokens, self.root(salt)
        found: list[int] = []
        for start in range(0, limit - size + 1, size):
            page = self._known.get((node, tuple(tokens[start : start + size])))
            if page is None:
                break
            found.append(page)
            node = self._node_of[page]
        return found, node

    @staticmethod
    def root(salt: Hashable) -> Hashable:
        """The node of a text's first page."""
        return ("root", salt)

    def remember(self, page: int, node: Hashable, tokens: Sequence[int]) -> Hashable:
        """Adds a full page to the prefix cache, unless it already has a page with the same key.

        Args:
            page: The page.
            node: The node of the previous page.
            tokens: The page's tokens.

        Returns:
            The page's node.
        """
        key = (node, tuple(tokens))
        if key not in self._known:
            self._known[key], self._key_of[page] = page, key
            self._nodes += 1
            self._node_of[page] = self._nodes
        return self._node_of[self._known[key]]


class KeyValueCache:
    """Keys and values of all layers, by slot: slot `page * page_tokens + i` is the i-th token of a page.

    Args:
        budget: Maximum size in bytes.
        page_tokens: Tokens per page.
        layers: Number of attention layers.
        shape: (key-value heads, size of a key, size of a value) of each layer.
        dtype: The dtype of keys and values.
        device: The device of keys and values.

    Attributes:
        keys: One tensor per layer, (slots, key-value heads, size of a key).
        values: One tensor per layer, (slots, key-value heads, size of a value).

    Raises:
        MiLoraError: If the budget is too small for one page.
    """

    def __init__(
        self, budget: int, page_tokens: int, layers: int, shape: tuple[int, int, int], dtype: Any, device: Any
    ) -> None:
        heads, key_size, value_size = shape
        of_page = layers * page_tokens * heads * (key_size + value_size) * dtype.itemsize
        pages = budget // of_page
        if pages < 1:
            raise MiLoraError(
                f"The cache's budget of {budget} bytes holds no page of {page_tokens} tokens, which takes {of_page}."
            )
        self.pool = PagePool(pages, page_tokens)
        slots = pages * page_tokens
        self.keys: list[Tensor] = [
            torch.empty(slots, heads, key_size, dtype=dtype, device=device) for _ in range(layers)
        ]
        self.values: list[Tensor] = [
            torch.empty(slots, heads, value_size, dtype=dtype, device=device) for _ in range(layers)
        ]

    @property
    def tokens(self) -> int:
        """Maximum number of tokens in the cache."""
        return self.pool.pages * self.pool.page_tokens

    def copy(self, source: int, target: int) -> None:
        """Copies a page's keys and values to another page."""
        size = self.pool.page_tokens
        for tensor in (*self.keys, *self.values):
            tensor[target * size : (target + 1) * size] = tensor[source * size : (source + 1) * size]
