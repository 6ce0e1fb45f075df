"""Incremental detokenization: emits whole characters and finds stop texts that span several tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""Tokenizers return this for a character with missing tokens."""


class Detokenizer:
    """The text of one generation.

    Decoding the whole text at each token would take quadratic time. Instead, a few old tokens and the new ones are
    decoded, and the text of the old ones is cut off.

    Args:
        tokenizer: The tokenizer of the request's adapter.
        stop: Texts that end the generation.
        keep_stop: Whether to keep the stop text in the output.

    Attributes:
        stopped_by: The stop text that was found, or `None`.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), *, keep_stop: bool = False) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._keep_stop = keep_stop
        self._tokens: list[int] = []
        self._first = 0
        self._read = 0
        self._held = ""
        self.stopped_by: str | None = None

    def add(self, token: int) -> str:
        """Returns the text that a token completes; empty while a character or a possible stop text is incomplete."""
        self._tokens.append(token)
        return self._piece(is_last=False)

    def finish(self) -> str:
        """Returns the text held back so far. Call it at the end of the generation."""
        return self._piece(is_last=True)

    def _piece(self, *, is_last: bool) -> str:
        if self.stopped_by is not None:
            return ""
        before = self._decode(self._tokens[self._first : self._read])
        text = self._decode(self._tokens[self._first :])
        if is_last or (len(text) > len(before) and not text.endswith(INCOMPLETE)):
            self._held += text[len(before) :]
            self._first, self._read = self._read, len(self._tokens)
        if not self._stop:
            piece, self._held = self._held, ""
            return piece
        return self._until_stop(is_last)

    def _until_stop(self, is_last: bool) -> str:
        found = [(self._held.find(stop), stop) for stop in self._stop if stop in self._held]
        if found:
            place, self.stopped_by = min(found, key=lambda pair: (pair[0] + len(pair[1]), pair[0]))
            return self._held[: place + len(self.stopped_by)] if self._keep_stop else self._held[:place]
        held = 0 if is_last else max(_overlap(self._held, stop) for stop in self._stop)
        piece = self._held[: len(self._held) - held]
        self._held = self._held[len(piece) :]
        return piece

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)) if tokens else ""


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of a text that is a proper prefix of a stop text."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
