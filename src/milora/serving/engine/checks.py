"""Checks requests before the engine queues them."""

from __future__ import annotations

from milora.serving.engine.adapter import Adapter
from milora.serving.engine.runner import Runner
from milora.serving.engine.settings import EngineSettings
from milora.serving.requests import GenerationRequest, InvalidRequestError, PromptTooLongError


def check_route(request: GenerationRequest, adapter: Adapter | None) -> None:
    """Checks that a request that gives a route has an adapter with routers.

    Raises:
        InvalidRequestError: If it is for the bare backbone or a plain LoRA adapter.
    """
    if request.route is None or (adapter is not None and adapter.kind != "LORA"):
        return
    model = "The bare backbone" if adapter is None else f"The adapter {adapter.name!r} is a plain LoRA, which"
    raise InvalidRequestError(f"{model} has no routers to follow a route: name a MiLoRA adapter, or give no route.")


def check_request(request: GenerationRequest, settings: EngineSettings, runner: Runner) -> None:
    """Checks a request against the backbone's and the engine's limits.

    Raises:
        InvalidRequestError: If the prompt is empty or has a token outside the vocabulary, or `n` is too large.
        PromptTooLongError: If prompt and new tokens exceed the backbone's positions or the cache.
    """
    prompt, sampling = request.prompt, request.sampling
    if not prompt:
        raise InvalidRequestError("The prompt has no tokens; there is nothing to continue.")
    size = runner.vocabulary
    strange = next((token for token in prompt if not 0 <= token < size), None)
    if strange is not None:
        raise InvalidRequestError(f"The prompt has the token {strange}; the vocabulary has {size} tokens.")
    if sampling.n > settings.most_texts:
        raise InvalidRequestError(f"n is {sampling.n}; the engine generates {settings.most_texts} texts at most.")
    total, positions = len(prompt) + sampling.max_tokens, runner.positions
    if positions is not None and total > positions:
        raise PromptTooLongError(
            f"The prompt has {len(prompt)} tokens, which with {sampling.max_tokens} new tokens exceeds the backbone's "
            f"{positions} positions: shorten it, or lower max_tokens."
        )
    pages = runner.cache.pool
    needed = sampling.n * -(-total // pages.page_tokens)
    if needed > pages.pages:
        raise PromptTooLongError(
            f"Prompt and new tokens take {needed} pages of the cache, which has {pages.pages}: shorten the prompt, or "
            "lower max_tokens or n."
        )
