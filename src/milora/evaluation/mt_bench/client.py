"""A client for chat models behind an OpenAI-compatible API, with the `openai` SDK (the extra `judge`)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from milora_core.errors import MiLoraError, importing

if TYPE_CHECKING:
    from openai import APIError

KEY_VARIABLES = ("MILORA_JUDGE_API_KEY", "OPENAI_API_KEY")
"""Environment variables of the key, in this order. The command line has no option, as other users can see it there."""


class ChatEndpoint:
    """`POST {url}/chat/completions`, with the SDK's retries.

    Requests are retried at most `retries` times after a time-out, a connection error, or status 408, 409, 429 or 5xx,
    with exponential backoff or the server's `Retry-After`. An endpoint is thread-safe.

    Args:
        url: The API's root, such as `https://api.openai.com/v1`.
        model: The model's name at this API.
        key: The bearer token; by default from the environment (`KEY_VARIABLES`), if set.
        timeout: Seconds to wait for a response.
        retries: Maximum number of retries.

    Raises:
        MiLoraError: If `url` is not an HTTP address.
        MissingExtraError: If the SDK is not installed.
    """

    def __init__(
        self, url: str, model: str, *, key: str | None = None, timeout: float = 120.0, retries: int = 6
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise MiLoraError(f"The judge's address must begin with http:// or https://; found {url!r}.")
        with importing("judge", "MT-Bench's judge"):
            import openai
        self.model = model
        self._address = f"{url.rstrip('/')}/chat/completions"
        self._key = key or next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
        # A local server may need no key, but the SDK requires one.
        self._headers: Any = {} if self._key else {"Authorization": openai.Omit()}
        self._client = openai.OpenAI(base_url=url, api_key=self._key or "none", timeout=timeout, max_retries=retries)

    def complete(self, messages: Sequence[Mapping[str, str]], *, temperature: float, max_tokens: int) -> str:
        """The model's reply to a conversation.

        Raises:
            MiLoraError: If all retries fail, the server rejects the key, the model or the request, or its response is
                not a chat completion.
        """
        import openai

        asked: Any = [dict(message) for message in messages]
        try:
            reply = self._client.chat.completions.create(
                model=self.model,
                messages=asked,
                temperature=temperature,
                max_tokens=max_tokens,
                extra_headers=self._headers,
            )
        except (openai.APIError, ValueError) as error:
            raise MiLoraError(self._refusal(error)) from error
        choices = getattr(reply, "choices", None)
        message = getattr(choices[0], "message", None) if choices else None
        if message is None:
            raise MiLoraError(f"The judge at {self._address} sent no chat completion: {_one_line(str(reply))}.")
        if not isinstance(message.content, str):
            raise MiLoraError(f"The judge at {self._address} sent a reply without text: {_one_line(str(message))}.")
        return message.content

    def _refusal(self, error: APIError | ValueError) -> str:
        import openai

        if isinstance(error, openai.APITimeoutError):
            return f"The judge at {self._address} does not answer: it took too long."
        if isinstance(error, openai.APIConnectionError):
            reason = _one_line(str(error.__cause__ or error)).rstrip(".")
            return f"The judge at {self._address} does not answer: {reason}."
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            where = f"the key in {' or '.join(KEY_VARIABLES)}" if self._key else f"a key: set {KEY_VARIABLES[0]}"
            return f"The judge at {self._address} refuses ({error.status_code}); it asks for {where}."
        if isinstance(error, openai.APIStatusError):
            wait = error.response.headers.get("Retry-After")
            again = f" It asks to wait {wait} seconds." if wait else ""
            return (
                f"The judge at {self._address} answered {error.status_code}: {_one_line(error.response.text)}.{again}"
            )
        return f"The judge at {self._address} sent no chat completion: {_one_line(str(error))}."


def _one_line(text: str, length: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[:length]}..."
