"""The chunks of a step, and the rows that adapters change."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

from milora_vllm.adapter import Routing, request_routing
from milora_vllm.routers import LayerRouter, Route
from milora_vllm.scheduling import KNOWN_ROUTES


class Chunk(NamedTuple):
    """The tokens of one request in a step.

    Attributes:
        request: The request's id.
        lora: The request's `LoRARequest`, or `None`.
        prompt: The prompt's tokens.
        parameters: The request's `SamplingParams`.
        first: Row of the chunk's first token in the step.
        end: Row after the chunk's last token.
        computed: Number of the request's tokens computed in earlier steps.
    """

    request: str
    lora: Any
    prompt: Sequence[int]
    parameters: Any
    first: int
    end: int
    computed: int


class Rows(NamedTuple):
    """Rows of a step that one adapter changes with one route."""

    first: int
    end: int
    slot: int
    route: Route


class Decision(NamedTuple):
    """A route that this step decides. The routers read the block inputs of rows `first` to `end - 1`."""

    first: int
    end: int
    route: Route
    routers: dict[int, LayerRouter]


@dataclass
class Step:
    """The running step.

    Attributes:
        rows: The rows that adapters change.
        decisions: The routes that the step decides.
        prepared: The linear modules' prepared operators. They are kept while the rows and their routes stay the same.
    """

    rows: list[Rows] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    prepared: dict[Any, Any] = field(default_factory=dict)


class Routes:
    """The routes of running requests and of earlier prompts.

    Args:
        new_route: Creates an undecided route.
    """

    def __init__(self, new_route: Callable[[], Route]) -> None:
        self._new_route = new_route
        self._routings: dict[str, Routing] = {}
        self._of_request: dict[str, Route] = {}
        self._by_key: OrderedDict[bytes, Route] = OrderedDict()

    def forget(self, request: str) -> None:
        """Removes a request that ended or was preempted."""
        self._routings.pop(request, None)
        route = self._of_request.pop(request, None)
        if route is not None:
            route.release()

    def follow(self, chunk: Chunk, slot: int, routers: dict[int, LayerRouter]) -> tuple[Rows | None, Decision | None]:
        """The adapted rows of a chunk of a MiLoRA request, and the decision if this chunk decides the route.

        Raises:
            RuntimeError: If the scheduler split the deciding tokens, or they were cached and their route is unknown.
        """
        routing = self._routings.get(chunk.request)
        if routing is None:
            routing = self._routings[chunk.request] = _routing(chunk)
        computed, after = chunk.computed, chunk.computed + chunk.end - chunk.first
        route = self._of_request.get(chunk.request)
        decision = None
        if route is None:
            route, is_new = self._route(routing, computed, after)
            if route is None:
                return None, None
            self._of_request[chunk.request] = route
            if is_new:
                shift = chunk.first - computed
                decision = Decision(routing.first + shift, routing.end + shift, route, routers)
        first = chunk.first + max(0, routing.adapted - computed)
        return (Rows(first, chunk.end, slot, route) if first < chunk.end else None), decision

    def _route(self, routing: Routing, computed: int, after: int) -> tuple[Route | None, bool]:
        known = self._by_key.get(routing.key)
        if known is not None:
            self._by_key.move_to_end(routing.key)
            return known, False
        if after <= routing.first:
            return None, False
        if computed > routing.first or after < routing.end:
            raise RuntimeError(
                f"MiLoRA's scheduling failed: tokens {routing.first} to {routing.end} decide the route and must be in "
                f"one step; found tokens {computed} to {after}."
            )
        route = self._by_key[routing.key] = self._new_route()
        # Keeps more routes than the scheduler assumes to be known.
        if len(self._by_key) > 2 * KNOWN_ROUTES:
            self._by_key.popitem(last=False)
        return route, True


def _routing(chunk: Chunk) -> Routing:
    routing = request_routing(
        SimpleNamespace(lora_request=chunk.lora, prompt_token_ids=chunk.prompt, sampling_params=chunk.parameters)
    )
    assert routing is not None
    return routing
