"""One streamed request to an OpenAI-compatible server, with the times of its tokens."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx2

DONE = "[DONE]"


@dataclass
class Answer:
    """The result of a request. Times are seconds from the run's start.

    Attributes:
        model: Which adapter, or the backbone.
        due: When it was to be sent; latencies count from then, so a client that is behind does not flatter the server.
        tokens: How many tokens the server says it generated; without its word, how many pieces came.
        prompt_tokens: How many tokens the server says the prompt has.
        arrivals: When each piece of text came.
        ended: When the stream ended.
        text: All of it.
        error: What went wrong; empty if nothing did.
    """

    model: str
    due: float
    tokens: int = 0
    prompt_tokens: int = 0
    arrivals: list[float] = field(default_factory=list)
    ended: float = 0.0
    text: str = ""
    error: str = ""

    @property
    def first_token(self) -> float:
        """Seconds to the first piece."""
        return self.arrivals[0] - self.due

    @property
    def gaps(self) -> list[float]:
        """Seconds between the pieces."""
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


async def ask(
    client: httpx2.AsyncClient, url: str, body: Mapping[str, Any], key: str | None, answer: Answer, start: float
) -> None:
    """Sends a request and fills in its answer.

    Args:
        client: The connections.
        url: The route's.
        body: The request's, with `stream`.
        key: The API key.
        answer: What is filled in.
        start: The run's start, in seconds of `time.perf_counter()`.
    """
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        async with client.stream("POST", url, json=body, headers=headers) as response:
            if response.status_code != 200:
                await response.aread()
                answer.error = f"{response.status_code} {_message(response.text)}"
                return
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                content = line.removeprefix("data: ")
                if content == DONE:
                    break
                _take(json.loads(content), answer, time.perf_counter() - start)
        answer.tokens = answer.tokens or len(answer.arrivals)
        if not answer.arrivals and not answer.error:
            answer.error = "no text came"
    except (httpx2.HTTPError, ValueError) as error:
        answer.error = f"{type(error).__name__} {error}".strip()
    finally:
        answer.ended = time.perf_counter() - start


def _take(chunk: Mapping[str, Any], answer: Answer, now: float) -> None:
    if "error" in chunk:
        answer.error = str(chunk["error"].get("message", chunk["error"]))
    for choice in chunk.get("choices") or ():
        piece = choice.get("text") or (choice.get("delta") or {}).get("content")
        if piece:
            answer.text += piece
            answer.arrivals.append(now)
    if usage := chunk.get("usage"):
        answer.tokens = int(usage["completion_tokens"])
        answer.prompt_tokens = int(usage["prompt_tokens"])


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]
