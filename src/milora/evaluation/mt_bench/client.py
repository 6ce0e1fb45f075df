"""A chat model behind an OpenAI-compatible API."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3 import BaseHTTPResponse
from urllib3.util import Retry

from milora_core.errors import MiLoraError

KEY_VARIABLES = ("MILORA_JUDGE_API_KEY", "OPENAI_API_KEY")
"""Where the key is looked for, in this order; it is never taken from the command line, where other users see it."""

LONGEST_WAIT = 120
"""Seconds between two tries, whoever sets them."""

RETRIED = (408, 409, 429, 500, 502, 503, 504)


class ChatEndpoint:
    """`POST {url}/chat/completions`, with retries.

    Requests that time out, cannot connect or are answered with 408, 409, 429 or 5xx are repeated with exponential
    backoff (or after what the server's `Retry-After` says, up to `LONGEST_WAIT` seconds), at most `retries` times. May
    be used by several threads.

    Args:
        url: The API's root, such as `https://api.openai.com/v1`.
        model: The model's name there.
        key: Sent as a bearer token; by default from the environment (`KEY_VARIABLES`), none if there is none.
        timeout: Seconds to wait for an answer.
        retries: How often a request is repeated.
        backoff: Seconds before the first repetition; doubled for each further one, at most `LONGEST_WAIT`.

    Raises:
        MiLoraError: If `url` is no HTTP address.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        timeout: float = 120.0,
        retries: int = 6,
        backoff: float = 1.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise MiLoraError(f"The judge's address must begin with http:// or https://; found {url!r}.")
        self.url = url.rstrip("/")
        self.model = model
        self.timeout = timeout
        self._key = key or next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
        self._retry = _Retry(
            total=retries,
            backoff_factor=backoff,
            backoff_max=LONGEST_WAIT,
            status_forcelist=RETRIED,
            allowed_methods=None,
            raise_on_status=False,
            respect_retry_after_header=True,
        )

    def complete(self, messages: Sequence[Mapping[str, str]], *, temperature: float, max_tokens: int) -> str:
        """The model's reply to a conversation.

        Raises:
            MiLoraError: If there is none after all repetitions, the server refuses (the key, the model, the request)
                or asks for a longer wait than `LONGEST_WAIT`, or what it sends is no chat completion.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        address = f"{self.url}/chat/completions"
        try:
            with requests.Session() as session:
                for scheme in ("http://", "https://"):
                    session.mount(scheme, HTTPAdapter(max_retries=self._retry))
                response = session.post(address, json=body, headers=headers, timeout=self.timeout)
        except requests.RequestException as error:
            raise MiLoraError(f"The judge at {address} does not answer: {_reason(error)}.") from error
        if response.status_code in (401, 403):
            where = f"the key in {' or '.join(KEY_VARIABLES)}" if self._key else f"a key: set {KEY_VARIABLES[0]}"
            raise MiLoraError(f"The judge at {address} refuses ({response.status_code}); it asks for {where}.")
        if not response.ok:
            raise MiLoraError(f"The judge at {address} answered {response.status_code}: {_one_line(response.text)}.")
        try:
            reply = response.json()["choices"][0]["message"]["content"]
        except (requests.JSONDecodeError, KeyError, IndexError, TypeError) as error:
            raise MiLoraError(f"The judge at {address} sent no chat completion: {_one_line(response.text)}.") from error
        if not isinstance(reply, str):
            raise MiLoraError(f"The judge at {address} sent a reply without text: {_one_line(response.text)}.")
        return reply


class _Retry(Retry):
    def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
        seconds = super().get_retry_after(response)
        if seconds is not None and seconds > LONGEST_WAIT:
            raise MiLoraError(
                f"The judge answered {response.status} and asks to wait {seconds:.0f} seconds, more than the "
                f"{LONGEST_WAIT} that are waited: give the same command again then."
            )
        return seconds


def _reason(error: requests.RequestException) -> str:
    if isinstance(error, requests.Timeout):
        return "it took too long"
    reason = getattr(error.args[0], "reason", None) if error.args else None
    return _one_line(str(reason or error)).rstrip(".")


def _one_line(text: str, length: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[:length]}..."
