"""Waiting and running requests, and their texts."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor

from milora.serving.engine.adapter import Adapter
from milora.serving.engine.beams import BeamSearch
from milora.serving.engine.detokenizer import Detokenizer
from milora.serving.engine.sampler import Sampler
from milora.serving.events import Generation
from milora.serving.requests import GenerationRequest
from milora.tuners.milora.packed import PackedRoute


@dataclass(eq=False)
class Text:
    """One text of a request: its tokens and its cache pages.

    Attributes:
        job: The request.
        index: Index of the text in its request.
        tokens: Prompt tokens and new tokens.
        computed: Number of tokens in the cache.
        pages: The text's cache pages, in order.
        known: Number of full pages in the prefix cache.
        node: The prefix cache's node of the last of these pages.
        logits: (vocabulary): the next-token logits, kept until the request's other beams are computed.
    """

    job: Job
    index: int
    tokens: list[int]
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    known: int = 0
    node: Hashable = None
    logits: Tensor | None = None
    sampler: Sampler | None = None
    detokenizer: Detokenizer | None = None

    @property
    def remaining(self) -> int:
        """Number of tokens to compute before the next token can be sampled."""
        return len(self.tokens) - self.computed

    @property
    def new_tokens(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[len(self.job.request.prompt) :]


@dataclass(eq=False)
class Job:
    """A request in the engine.

    Attributes:
        request: The request as submitted.
        generation: Receives the events.
        adapter: The adapter; `None` for the bare backbone.
        number: Position in the order of arrival.
        route: The route; `None` without an adapter. It is incomplete until the routers have decided.
        is_routed: Whether the route is known.
        texts: The unfinished texts; only one until the prompt is computed.
        finished: Number of finished texts.
        cached_tokens: Number of prompt tokens found in the prefix cache.
        is_forked: Whether the prompt is computed and the request has one text per completion.
        has_begun: Whether an event was sent.
        search: The beam search, if the request uses one.
    """

    request: GenerationRequest
    generation: Generation
    adapter: Adapter | None
    number: int
    route: PackedRoute | None = None
    is_routed: bool = False
    texts: list[Text] = field(default_factory=list)
    finished: int = 0
    cached_tokens: int | None = None
    is_forked: bool = False
    has_begun: bool = False
    search: BeamSearch | None = None

    def __post_init__(self) -> None:
        self.texts = [Text(self, 0, list(self.request.prompt))]

    @property
    def tenant(self) -> str:
        """The request's tenant."""
        return self.request.tenant

    @property
    def rows(self) -> int:
        """Maximum number of texts that it generates concurrently."""
        return self.request.sampling.n - self.finished

    @property
    def bare_tokens(self) -> int:
        """Number of leading tokens that the bare backbone computes."""
        if self.adapter is None or not self.adapter.is_late:
            return 0
        return len(self.request.prompt) - 1

    @property
    def deciding(self) -> tuple[int, int] | None:
        """Index of the first token that the routers read, and the number they read; `None` if no routing is left."""
        if self.adapter is None or self.is_routed:
            return None
        return self.adapter.deciding(len(self.request.prompt))

    def salt(self) -> Hashable | None:
        """A key for the weights that compute the cached tokens; `None` while the route is unknown."""
        if self.adapter is None:
            return ()
        return self.adapter.salt(self.route if self.is_routed else None)

    def cacheable(self, tokens: int) -> int:
        """Number of a text's first `tokens` tokens that the prefix cache may hold."""
        if self.adapter is not None and self.adapter.is_shared:
            return min(tokens, self.bare_tokens)
        return tokens
