"""Detects clients that disconnect or stop reading."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

CLIENT_GONE = 499
"""The status, in logs and metrics, of a request whose client disconnected; as in nginx."""


class ClientGoneError(Exception):
    """The client closed its connection, or stopped reading."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work` and returns its result. Cancels it if the client closes its connection.

    Args:
        receive: The ASGI function, after the body was read.
        work: The coroutine that computes the response.

    Raises:
        ClientGoneError: If the client closed its connection.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return await working
    finally:
        for task in (working, watching):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response of server-sent events.

    Args:
        chunks: The events. The generator is always closed.
        stall_seconds: Maximum time that the client may leave the connection full before it counts as disconnected.
        ended: Always called once at the end, with whether the client disconnected. Release the request's resources
            here: a generator that never started does not run its `finally`.
    """

    media_type = "text/event-stream"

    def __init__(
        self, chunks: AsyncGenerator[bytes, None], stall_seconds: float, ended: Callable[[bool], None]
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._stall_seconds = stall_seconds
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Writes the events until the end or until the client disconnects."""
        is_gone = False
        try:
            await unless_gone(receive, self._write(send))
        except ClientGoneError:
            is_gone = True
        finally:
            await self._chunks.aclose()
            self._ended(is_gone)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for chunk in self._chunks:
            with anyio.move_on_after(self._stall_seconds) as patience:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            if patience.cancelled_caught:
                raise ClientGoneError
        await send({"type": "http.response.body", "body": b"", "more_body": False})
