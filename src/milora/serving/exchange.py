"""The state of one request in the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

from milora.serving.answers import Form, Text, Usage
from milora.serving.errors import ApiError
from milora.serving.events import Generation, TokenEvent
from milora.serving.metrics import Metrics
from milora.serving.tenants import Tenant


class Exchange:
    """One request: its generations, its texts and token counts, and its metrics.

    It counts as a request of its tenant from its creation until [`close`].

    Args:
        tenant: The tenant that sent the request.
        token_texts: Maps token ids to their texts, each decoded separately.
        form: The format of the response.
        metrics: The metrics to update.
        arrived: Time of arrival in seconds of `time.monotonic()`.
        texts_per_prompt: The request's `n`.
        prompt_tokens: Number of tokens of all prompts.
        most_new_tokens: Maximum number of new tokens of all texts.

    Attributes:
        usage: The token counts so far.
        texts: The texts so far: those of the first prompt, then those of the second, and so on.
        first_token_seconds: Time from arrival to the first token.

    Raises:
        ApiError: If the tenant has reached a limit.
    """

    def __init__(
        self,
        tenant: Tenant,
        token_texts: Callable[[Sequence[int]], Awaitable[dict[int, str]]],
        form: Form,
        metrics: Metrics,
        *,
        arrived: float,
        texts_per_prompt: int,
        prompt_tokens: int,
        most_new_tokens: int,
    ) -> None:
        self.token_texts = token_texts
        self.form = form
        self.usage = Usage(prompt_tokens)
        self.texts: list[Text] = []
        self.first_token_seconds: float | None = None
        self._tenant = tenant
        self._metrics = metrics
        self._arrived = arrived
        self._per_prompt = texts_per_prompt
        self._reserved = most_new_tokens
        self._generations: list[Generation] = []
        self._cached: dict[int, int] = {}
        self._is_open = True
        tenant.begin()
        try:
            tenant.reserve(prompt_tokens + most_new_tokens)
        except ApiError:
            tenant.end()
            raise

    def add(self, generation: Generation) -> None:
        """Adds the generation of the next prompt."""
        self._generations.append(generation)
        start = len(self.texts)
        self.texts += [Text(start + index) for index in range(self._per_prompt)]

    async def events(self) -> AsyncGenerator[tuple[Text, TokenEvent], None]:
        """Yields events as they are generated, each with its text (including the event).

        Raises:
            ServingError: If the engine ends a generation with an error.
        """
        merged = _merged(self._generations)
        try:
            async for place, event in merged:
                text = self.texts[place * self._per_prompt + event.index]
                text.add(event)
                self._cached[place] = max(self._cached.get(place, 0), event.cached_tokens)
                self.usage.cached_tokens = sum(self._cached.values())
                self.usage.completion_tokens += len(event.tokens)
                if event.route is not None:
                    for other in self.texts[place * self._per_prompt : (place + 1) * self._per_prompt]:
                        other.route = event.route
                if event.tokens and self.first_token_seconds is None:
                    self.first_token_seconds = max(event.made - self._arrived, 0.0)
                yield text, event
        finally:
            await merged.aclose()

    def close(self) -> None:
        """Cancels unfinished generations and counts the request. You may call it more than once."""
        if not self._is_open:
            return
        self._is_open = False
        for generation in self._generations:
            generation.cancel()
        tenant, metrics, usage = self._tenant, self._metrics, self.usage
        tenant.end()
        is_refused = not self._generations
        tenant.give_back(self._reserved - usage.completion_tokens + (usage.prompt_tokens if is_refused else 0))
        if is_refused:
            return
        metrics.prompt_tokens.labels(tenant.name).inc(usage.prompt_tokens)
        metrics.cached_tokens.labels(tenant.name).inc(usage.cached_tokens)
        metrics.generated_tokens.labels(tenant.name).inc(usage.completion_tokens)
        if self.first_token_seconds is not None:
            metrics.first_token_seconds.labels(tenant.name).observe(self.first_token_seconds)
        for text in self.texts:
            if text.first is not None and text.tokens > 1:
                metrics.per_token_seconds.labels(tenant.name).observe((text.last - text.first) / (text.tokens - 1))


async def _merged(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, TokenEvent], None]:
    """Merges the events of several generations in order of arrival, each with its generation's index."""
    if len(generations) == 1:
        async for event in generations[0]:
            yield 0, event
        return
    queue: asyncio.Queue[tuple[int, TokenEvent] | Exception | None] = asyncio.Queue()

    async def pump(place: int, generation: Generation) -> None:
        try:
            async for event in generation:
                queue.put_nowait((place, event))
        except Exception as error:  # raised again in the reader's task
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    pumps = [asyncio.ensure_future(pump(*each)) for each in enumerate(generations)]
    try:
        running = len(pumps)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
