"""Responses in OpenAI's format, complete or as chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from milora.serving.events import TokenEvent, TokenLogprob
from milora_core.routing import Route

LOWEST_LOGPROB = -9999.0
"""Replaces minus infinity, which JSON does not have; as in vLLM."""

TokenTexts = Callable[[Sequence[int]], list[str]]
"""Maps token ids to their texts, each decoded separately."""


@dataclass
class Usage:
    """The token counts of a response."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass
class Text:
    """One text of a response, during generation.

    Attributes:
        index: The index among the response's choices.
        text: The text so far.
        logprobs: The log-probabilities of the tokens so far, if requested.
        finish_reason: `stop` or `length`, at the end.
        stop_reason: The stop token or text that ended it.
        route: The prompt's route, if requested.
        first: Time of the first token, in seconds of `time.monotonic()`.
        last: Time of the last token.
        tokens: Number of tokens so far.
    """

    index: int
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    route: Route | None = None
    first: float | None = None
    last: float = 0.0
    tokens: int = 0

    def add(self, event: TokenEvent) -> None:
        """Adds an event of the engine."""
        self.text += event.text
        self.logprobs += event.logprobs or ()
        self.finish_reason = event.finish_reason
        self.stop_reason = event.stop_reason
        if event.tokens:
            self.first = event.made if self.first is None else self.first
            self.last = event.made
            self.tokens += len(event.tokens)


@dataclass(frozen=True)
class Form:
    """The format of the response to a request.

    Attributes:
        is_chat: Whether the request is a chat completion.
        model: The model's name in the request.
        with_logprobs: Whether log-probabilities were requested.
        with_route: Whether routes were requested.
        id: The response's id.
        created: Time of creation, in seconds since 1970.
    """

    is_chat: bool
    model: str
    with_logprobs: bool
    with_route: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, texts: Sequence[Text], usage: Usage, token_texts: TokenTexts) -> dict[str, Any]:
        """The complete response."""
        kind = "chat.completion" if self.is_chat else "text_completion"
        choices = []
        for text in texts:
            content = {"message": {"role": "assistant", "content": text.text}} if self.is_chat else {"text": text.text}
            choices.append(self._choice(text.index, content, text, text.logprobs, 0, token_texts, text.route))
        return {**self._head(kind), "choices": choices, "usage": usage.to_dict()}

    def chunk(
        self, text: Text, event: TokenEvent, offset: int, token_texts: TokenTexts, *, is_first: bool
    ) -> dict[str, Any] | None:
        """The chunk of a stream for one event; `None` if the event has nothing to show.

        Args:
            text: The text, including the event.
            event: The event.
            offset: Number of characters of the text before the event.
            token_texts: The texts of token ids.
            is_first: Whether this is the text's first chunk.
        """
        shows = event.text or event.finish_reason or (self.with_logprobs and event.tokens)
        if not shows and event.route is None:
            return None
        content: dict[str, Any] = {"text": event.text}
        if self.is_chat:
            content = {"delta": {**({"role": "assistant"} if is_first else {}), "content": event.text}}
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        logprobs = list(event.logprobs or ())
        choice = self._choice(text.index, content, text, logprobs, offset, token_texts, event.route)
        if event.route is None:
            choice.pop("milora", None)
        return {**self._head(kind), "choices": [choice]}

    def last(self, usage: Usage) -> dict[str, Any]:
        """The final chunk, with the token counts."""
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {**self._head(kind), "choices": [], "usage": usage.to_dict()}

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def _choice(
        self,
        index: int,
        content: dict[str, Any],
        text: Text,
        logprobs: list[TokenLogprob],
        offset: int,
        token_texts: TokenTexts,
        route: Route | None,
    ) -> dict[str, Any]:
        shown = None
        if self.with_logprobs:
            shown = (_chat_logprobs if self.is_chat else _completion_logprobs)(logprobs, offset, token_texts)
        choice = {
            "index": index,
            **content,
            "logprobs": shown,
            "finish_reason": text.finish_reason,
            "stop_reason": text.stop_reason,
        }
        if self.with_route:
            choice["milora"] = {"route": None if route is None else route.to_dict()}
        return choice


def _completion_logprobs(logprobs: list[TokenLogprob], offset: int, token_texts: TokenTexts) -> dict[str, Any]:
    tokens = token_texts([each.token for each in logprobs])
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    top = []
    for token, each in zip(tokens, logprobs, strict=True):
        names = token_texts([other for other, _ in each.top])
        of_token = {name: _finite(value) for name, (_, value) in zip(names, each.top, strict=True)}
        top.append({**of_token, token: _finite(each.logprob)})
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(each.logprob) for each in logprobs],
        "top_logprobs": top,
        "text_offset": offsets,
    }


def _chat_logprobs(logprobs: list[TokenLogprob], offset: int, token_texts: TokenTexts) -> dict[str, Any]:
    def entry(token: str, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": _finite(logprob), "bytes": list(token.encode())}

    content = []
    for token, each in zip(token_texts([each.token for each in logprobs]), logprobs, strict=True):
        names = token_texts([other for other, _ in each.top])
        top = [entry(name, value) for name, (_, value) in zip(names, each.top, strict=True)]
        content.append({**entry(token, each.logprob), "top_logprobs": top})
    return {"content": content}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
