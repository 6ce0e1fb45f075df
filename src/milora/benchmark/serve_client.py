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
        model: The adapter, or the backbone.
        due: Planned time of sending. Latencies start here, so a late client does not make the server look faster.
        tokens: Number of generated tokens that the server reports, else the number of pieces of text.
        prompt_tokens: Number of prompt tokens that the server reports.
        arrivals: Time of arrival of each piece of text.
        ended: Time of the stream's end.
        text: The complete text.
        error: The error, or empty.
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
        """The result for JSON."""
        return asdict(self)


async def ask(
    client: httpx2.AsyncClient, url: str, body: Mapping[str, Any], key: str | None, answer: Answer, start: float
) -> None:
    """Sends a request and fills in its answer.

    Args:
        client: The HTTP client.
        url: The route's URL.
        body: The request's body, with `stream`.
        key: The API key.
        answer: The result to fill in.
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
