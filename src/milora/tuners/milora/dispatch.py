"""The route in force: one place that a model's routers write to and its LoRA layers read from."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from milora.errors import MiLoraError
from milora.routing import Decision, Route


class Selection:
    """What one expert does in a pass: for which rows of its adapter's batch it runs, and with which weight.

    Attributes:
        batch: How many rows the adapter's batch has.
        rows: Indices of the rows that chose the expert, or `None` for all.
    """

    def __init__(self, batch: int, rows: Tensor | None, gates: Tensor | None, column: int) -> None:
        self.batch = batch
        self.rows = rows
        self._gates = gates
        self._column = column
        # A constant gate is cut out once; one with a gradient inside the layer, whose recomputation under gradient
        # checkpointing must build its own graph.
        self._constant = None if gates is None or gates.requires_grad else self._cut()

    def gate(self) -> Tensor | None:
        """(rows), float32, or `None` where every weight is exactly 1 and has no gradient."""
        if self._gates is None or self._constant is not None:
            return self._constant
        return self._cut()

    def _cut(self) -> Tensor:
        assert self._gates is not None
        column = self._gates[:, self._column]
        return column if self.rows is None else column.index_select(0, self.rows)


def select(gates: Tensor, chosen: Tensor) -> list[Selection | None]:
    """One [`Selection`] an expert, `None` for those that no row chose. Reads `chosen` on the host, once.

    Args:
        gates: (batch, experts), float32.
        chosen: (batch, experts), bool.
    """
    # One transfer for both questions: who is chosen, and whether every chosen one has weight 1.
    answers = torch.stack([chosen, gates.detach() == 1]).tolist()
    rows_of = [[row for row, of_row in enumerate(answers[0]) if of_row[expert]] for expert in range(chosen.shape[1])]
    is_one = all(
        one for picks, ones in zip(*answers, strict=True) for pick, one in zip(picks, ones, strict=True) if pick
    )
    kept = None if is_one and not gates.requires_grad else gates
    batch = chosen.shape[0]
    return [
        Selection(batch, None if len(rows) == batch else torch.tensor(rows, device=gates.device), kept, expert)
        if rows
        else None
        for expert, rows in enumerate(rows_of)
    ]


@dataclass
class BlockRouting:
    """The decision of one router in one pass, for the rows of one adapter."""

    experts: tuple[str, ...]
    decision: Decision
    selections: list[Selection | None]


@dataclass
class RoutingPass:
    """One forward pass: whose prompts it holds, and what has been decided for them so far.

    A pass outlives its forward where it is needed again: in the decode steps of a generation, and in the backward pass
    under gradient checkpointing, which runs a block a second time.

    Attributes:
        rows: Number of rows of the batch.
        prompt: (rows, tokens), bool, or `None` where a route is forced.
        adapter_rows: Rows of each adapter, `None` for all rows.
        forced: The route to follow instead of asking the routers, already of `rows` rows.
        routings: Adapter -> block -> decision.
    """

    rows: int
    prompt: Tensor | None
    adapter_rows: dict[str, list[int] | None]
    forced: Route | None = None
    routings: dict[str, dict[str, BlockRouting]] = field(default_factory=dict)
    routed_blocks: set[str] = field(default_factory=set)

    def selection(self, adapter: str, block: str, expert: int) -> Selection | None:
        """What an expert of an adapter does; a block that this pass has not reached has no answer.

        Raises:
            RuntimeError: If the block has not been routed, because its layers were called outside the block.
        """
        routing = self.routings.get(adapter, {}).get(block)
        if routing is None:
            raise RuntimeError(
                f"A layer of {block} was called for adapter {adapter!r} before the block was: there is no route yet. "
                "Call the whole model."
            )
        return routing.selections[expert]

    def route(self, blocks: tuple[str, ...]) -> Route:
        """The decisions of all adapters as a value; rows without an adapter have gate and probability 0."""
        experts = tuple(
            dict.fromkeys(
                expert
                for block in blocks
                for of_adapter in self.routings.values()
                if block in of_adapter
                for expert in of_adapter[block].experts
            )
        )
        used = tuple(block for block in blocks if any(block in of_adapter for of_adapter in self.routings.values()))
        device = next((r.decision.gates.device for a in self.routings.values() for r in a.values()), None)
        gates = torch.zeros(len(used), self.rows, len(experts), device=device)
        probabilities = torch.zeros_like(gates)
        for adapter, of_adapter in self.routings.items():
            rows = self.adapter_rows[adapter]
            index = torch.arange(self.rows, device=device) if rows is None else torch.tensor(rows, device=device)
            for block, routing in of_adapter.items():
                columns = torch.tensor([experts.index(expert) for expert in routing.experts], device=device)
                place = (used.index(block), index[:, None], columns[None, :])
                gates[place] = routing.decision.gates.detach().to(gates)
                probabilities[place] = routing.decision.probabilities.detach().to(gates)
        return Route(gates, probabilities, experts, used)


class _Generation:
    """A running `generate`: its first forward pass is the prefill, whose decisions the others follow."""

    def __init__(self, attended: Tensor | None) -> None:
        self.attended = attended
        self.routing_pass: RoutingPass | None = None


class _Current(threading.local):
    """What is in force in a thread: requests served by several threads must not see each other's routes."""

    def __init__(self) -> None:
        self.routing_pass: RoutingPass | None = None
        self.generation: _Generation | None = None
        self.forced: Route | None = None
        self.adapter_names: list[str] | None = None
        self.prompt: Tensor | None = None


class Dispatcher:
    """Holds what is in force: the running pass, the running generation, a forced route, the adapters of the rows."""

    def __init__(self) -> None:
        self._current = _Current()
        self._of_cache: WeakKeyDictionary[Any, RoutingPass] = WeakKeyDictionary()

    # A copied or pickled model starts with nothing in force: passes belong to the model that ran them.
    def __getstate__(self) -> dict[str, Any]:
        return {"in_force": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    @property
    def current(self) -> RoutingPass | None:
        """The pass that is running in this thread."""
        return self._current.routing_pass

    def current_selection(self, adapter: str, block: str, expert: int) -> Selection | None:
        """What an expert of the running pass does, `None` for nothing.

        Raises:
            RuntimeError: If no pass is running, or it has not reached the block.
        """
        if self.current is None:
            raise RuntimeError(f"A layer of {block} was called outside the model: there is no route. Call the model.")
        return self.current.selection(adapter, block, expert)

    @property
    def forced(self) -> Route | None:
        """The route that [`Dispatcher.forcing`] put in force."""
        return self._current.forced

    @property
    def adapter_names(self) -> list[str] | None:
        """The adapter of each row, where rows have their own."""
        return self._current.adapter_names

    @property
    def prompt(self) -> Tensor | None:
        """The prompt's tokens, where the caller said which they are."""
        return self._current.prompt

    def begin(self, routing_pass: RoutingPass) -> None:
        """Puts a pass in force; in a generation it stays the one to follow until the generation ends."""
        self._current.routing_pass = routing_pass
        if self._current.generation is not None:
            self._current.generation.routing_pass = routing_pass

    def end(self, cache: Any = None) -> None:
        """Ends the running pass. Outside `generate`, the cache that it filled keeps its decisions for later passes."""
        if self._current.generation is None and cache is not None and self.current is not None:
            self._of_cache[cache] = self.current
        self._current.routing_pass = None

    def following(self) -> RoutingPass | None:
        """The pass whose decisions the next forward of this thread's generation follows; `None` at its prefill."""
        generation = self._current.generation
        return None if generation is None else generation.routing_pass

    def generation_mask(self) -> Tensor | None:
        """The attention mask that the caller gave to the running `generate`."""
        generation = self._current.generation
        return None if generation is None else generation.attended

    def of_cache(self, cache: Any) -> RoutingPass | None:
        """The pass that filled a cache in an earlier forward of the caller's own loop."""
        return self._of_cache.get(cache)

    @contextmanager
    def generating(self, attended: Tensor | None) -> Iterator[_Generation]:
        """In force: a generation. What it decided is freed at the end, however that comes."""
        outer, self._current.generation = self._current.generation, _Generation(attended)
        try:
            yield self._current.generation
        finally:
            self._current.generation = outer
            self._current.routing_pass = None

    @contextmanager
    def forcing(self, route: Route | None) -> Iterator[None]:
        """In force: a given route, instead of what the routers would decide; `None` changes nothing."""
        outer = self._current.forced
        self._current.forced = outer if route is None else route
        try:
            yield
        finally:
            self._current.forced = outer

    @contextmanager
    def serving(self, adapter_names: list[str] | None) -> Iterator[None]:
        """In force: an adapter for each row."""
        outer, self._current.adapter_names = self._current.adapter_names, adapter_names
        try:
            yield
        finally:
            self._current.adapter_names = outer

    @contextmanager
    def prompting(self, prompt: Tensor) -> Iterator[None]:
        """In force: which tokens are the prompt, for passes whose labels do not say."""
        outer, self._current.prompt = self._current.prompt, prompt
        try:
            yield
        finally:
            self._current.prompt = outer

    @contextmanager
    def resuming(self, routing_pass: RoutingPass | None) -> Iterator[None]:
        """In force again: the pass of an earlier forward, while one of its blocks is recomputed."""
        outer, self._current.routing_pass = self._current.routing_pass, routing_pass
        try:
            yield
        finally:
            self._current.routing_pass = outer


def follow(
    route: Route, block: str, experts: tuple[str, ...], rows: list[int] | None, device: torch.device
) -> Decision:
    """What a forced route says for a block, as a router would have said it.

    Raises:
        MiLoraError: If the route does not know the block or one of its experts.
    """
    if block not in route.blocks or not set(experts) <= set(route.experts):
        raise MiLoraError(
            f"The route in force is for the blocks {list(route.blocks[:2])}... with experts {list(route.experts)}; the "
            f"adapter has {block} with experts {list(experts)}. Use a route of the same adapter and backbone."
        )
    columns = [route.experts.index(expert) for expert in experts]
    picked = route if rows is None else route[rows]
    at = route.blocks.index(block)
    gates = picked.gates[at][:, columns].to(device)
    return Decision(gates, picked.probabilities[at][:, columns].to(device), gates != 0)
