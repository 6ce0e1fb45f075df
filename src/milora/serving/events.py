"""The response of the embedded engine to a request: events, which a reader iterates over."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

from milora_core.routing import Route


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability under the model, before temperature, penalties, top-k, top-p and min-p.

    Attributes:
        token: The token's id.
        logprob: The natural logarithm of its probability.
        top: The most probable tokens at this position and their log-probabilities, the best first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenEvent:
    """New tokens of one of a request's texts, or the end of a text.

    Attributes:
        index: The index of the text.
        text: The new piece of text. It may be empty while a character or a possible stop text is incomplete.
        tokens: The new tokens.
        logprobs: One for each token, if requested.
        finish_reason: `"stop"` or `"length"` on the last event of a text, else `None`.
        stop_reason: The stop token or text that ended the text; `None` for an end-of-sequence token.
        cached_tokens: Number of prompt tokens read from the prefix cache.
        route: The route, on the first event of a request with `return_route`; `None` without a router.
        made: Time in seconds of `time.monotonic()` at which the tokens were generated.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    cached_tokens: int = 0
    route: Route | None = None
    made: float = field(default_factory=time.monotonic)


class Generation:
    """The response to a request: an iterator over [`TokenEvent`]s, synchronous or asynchronous, for one reader.

    Iteration ends after the last event of the last text, or raises the [`ServingError`] that ended the request.

    Args:
        on_cancel: Called once when the reader cancels, in the reader's thread.

    Attributes:
        submitted: Time of creation in seconds of `time.monotonic()`.
    """

    def __init__(self, on_cancel: Callable[[], None]) -> None:
        self.submitted = time.monotonic()
        self._on_cancel = on_cancel
        self._events: deque[TokenEvent | Exception | None] = deque()
        self._changed = threading.Condition()
        self._waiting: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._is_cancelled = False
        self._is_over = False

    @property
    def is_cancelled(self) -> bool:
        """Whether the reader has cancelled it."""
        return self._is_cancelled

    def cancel(self) -> None:
        """Ends the request at the engine's next step. You may call it from any thread and more than once."""
        with self._changed:
            if self._is_cancelled or self._is_over:
                return
            self._is_cancelled = True
        self._on_cancel()

    def put(self, event: TokenEvent) -> None:
        """Adds an event. Only the engine calls this."""
        self._add(event)

    def end(self, error: Exception | None = None) -> None:
        """Ends the iteration, with or without an error. Only the engine calls this."""
        self._is_over = True
        self._add(error)

    def __iter__(self) -> Iterator[TokenEvent]:
        return self

    def __next__(self) -> TokenEvent:
        with self._changed:
            while not self._events:
                self._changed.wait()
        event = self._take()
        if event is None:
            raise StopIteration
        return event

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self

    async def __anext__(self) -> TokenEvent:
        while True:
            with self._changed:
                if self._events:
                    break
                arrived = asyncio.Event()
                self._waiting = (asyncio.get_running_loop(), arrived)
            await arrived.wait()
        event = self._take()
        if event is None:
            raise StopAsyncIteration
        return event

    def _take(self) -> TokenEvent | None:
        event = self._events.popleft()
        if isinstance(event, TokenEvent):
            return event
        self._events.append(event)  # For a reader that asks again.
        if event is not None:
            raise event
        return None

    def _add(self, event: TokenEvent | Exception | None) -> None:
        with self._changed:
            self._events.append(event)
            waiting, self._waiting = self._waiting, None
            self._changed.notify_all()
        if waiting is not None and not waiting[0].is_closed():
            waiting[0].call_soon_threadsafe(waiting[1].set)
