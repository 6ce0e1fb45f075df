"""A request that is waiting or running, and its texts."""

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
    """One text of a request: its tokens, and where their keys and values are.

    Attributes:
        job: The request.
        index: Which of its texts.
        tokens: The prompt's and the new ones.
        computed: How many of them the cache holds.
        pages: The pages of the cache, in order.
        known: How many full pages the prefix cache knows.
        node: The prefix cache's node of the last of these.
        logits: (vocabulary): what follows, while other beams of the request are still to be computed.
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
        """Tokens that are still to be computed before the next one is known."""
        return len(self.tokens) - self.computed

    @property
    def new_tokens(self) -> list[int]:
        """The tokens behind the prompt."""
        return self.tokens[len(self.job.request.prompt) :]


@dataclass(eq=False)
class Job:
    """A request in the engine.

    Attributes:
        request: What was asked for.
        generation: Where events go.
        adapter: The adapter; `None` for the bare backbone.
        number: Its place in the order of arrival.
        route: Its route; `None` without an adapter. It is incomplete until the routers have decided.
        is_routed: Whether the route is known.
        texts: Its unfinished texts; one until the prompt is read.
        finished: How many texts have ended.
        cached_tokens: Tokens of the prompt that the prefix cache held.
        is_forked: Whether the prompt has been read and each text goes its own way.
        has_begun: Whether the reader has had an event.
        search: The beam search, if it is one.
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
        """Whose it is."""
        return self.request.tenant

    @property
    def rows(self) -> int:
        """How many texts it has at once, at most."""
        return self.request.sampling.n - self.finished

    @property
    def bare_tokens(self) -> int:
        """How many tokens at the beginning of a text the adapter leaves to the bare backbone."""
        if self.adapter is None or not self.adapter.is_late:
            return 0
        return len(self.request.prompt) - 1

    @property
    def deciding(self) -> tuple[int, int] | None:
        """The first token that the routers read, and how many they read; `None` if there is nothing to decide."""
        if self.adapter is None or self.is_routed:
            return None
        return self.adapter.deciding(len(self.request.prompt))

    def salt(self) -> Hashable | None:
        """What computes the tokens that the prefix cache may hold; `None` while that is not known."""
        if self.adapter is None:
            return ()
        return self.adapter.salt(self.route if self.is_routed else None)

    def cacheable(self, tokens: int) -> int:
        """How many of a text's first tokens the prefix cache may hold."""
        if self.adapter is not None and self.adapter.is_shared:
            return min(tokens, self.bare_tokens)
        return tokens
