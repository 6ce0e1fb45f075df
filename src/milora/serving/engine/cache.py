"""The key-value cache: pages of tokens that texts own, share and leave to later prompts with the same beginning."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from milora_core.errors import MiLoraError


class PagePool:
    """Pages of the cache, by number: who holds them, and which tokens those hold that nobody does.

    A full page is known by the tokens in it, those before it, and a salt that stands for what computed them (an adapter
    and its route, or the bare backbone). Keys hold the tokens themselves, so no two prompts are taken for each other.
    Pages that nobody holds stay known until the room is needed; the one that was let go first is given away first.

    Args:
        pages: How many there are.
        page_tokens: Tokens of a page.
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
        """Pages that can be taken now."""
        return len(self._free) + len(self._idle)

    @property
    def idle(self) -> int:
        """Pages that nobody holds and that are still known by their tokens."""
        return len(self._idle)

    def take(self) -> int:
        """A page for one holder, with anything in it; there must be one [`PagePool.available`]."""
        if self._free:
            page = self._free.popleft()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._known[self._key_of.pop(page)], self._node_of[page]
        self._holders[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more holder of a page."""
        if self._holders[page] == 0:
            del self._idle[page]
        self._holders[page] += 1

    def is_shared(self, page: int) -> bool:
        """Whether a page has several holders."""
        return self._holders[page] > 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less of each of a text's pages, given in the text's order."""
        for page in reversed(pages):  # The end of a prompt is given away before its beginning, which more prompts have.
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def match(self, salt: Hashable, tokens: Sequence[int], limit: int) -> tuple[list[int], Hashable]:
        """The pages known for the beginning of some tokens; they must be shared before another page is taken.

        Args:
            salt: What computes the tokens.
            tokens: The tokens.
            limit: The most tokens to look for.

        Returns:
            The pages, and the node that the page after them is a child of.
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
        """Makes a full page known; of two pages with the same tokens the first is.

        Args:
            page: The page.
            node: The node of the page before it.
            tokens: The page's tokens.

        Returns:
            The node of the page.
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
        budget: Bytes that they may take.
        page_tokens: Tokens of a page.
        layers: How many attention layers there are.
        shape: (key-value heads, size of a key, size of a value) of a layer.
        dtype: Of keys and values.
        device: Where they are.

    Attributes:
        keys: A tensor a layer, (slots, key-value heads, size of a key).
        values: A tensor a layer, (slots, key-value heads, size of a value).

    Raises:
        MiLoraError: If the budget is below one page.
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
        """How many tokens it holds at most."""
        return self.pool.pages * self.pool.page_tokens

    def copy(self, source: int, target: int) -> None:
        """Copies the keys and values of a page."""
        size = self.pool.page_tokens
        for tensor in (*self.keys, *self.values):
            tensor[target * size : (target + 1) * size] = tensor[source * size : (source + 1) * size]
