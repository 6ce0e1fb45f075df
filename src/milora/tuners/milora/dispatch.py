"""The route in force: one place that a model's routers write to and its LoRA layers read from."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from milora.errors import MiLoraError
from milora.routing import Decision, Route
from milora.tuners.milora.decoding import PreparedExperts
from milora.tuners.prompt_pass import PromptPass, PromptPasses


class Selection:
    """What one expert does in a pass: for which rows of its adapter's batch it runs, and with which weight.

    Attributes:
        batch: How many rows the adapter's batch has.
        weights: Row -> gate, of the rows that chose the expert, as the host knows them.
        rows: Indices of those rows on the device, or `None` for all.
    """

    def __init__(
        self, batch: int, weights: dict[int, float], rows: Tensor | None, gates: Tensor | None, column: int
    ) -> None:
        self.batch = batch
        self.weights = weights
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

    @property
    def common_weight(self) -> float | None:
        """The weight that all rows of the batch have in common, `None` where rows differ."""
        different = set(self.weights.values())
        return different.pop() if self.rows is None and len(different) == 1 else None

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
    # One transfer for both questions: who is chosen, and with which weight.
    picks, weights = torch.stack([chosen.to(gates.dtype), gates.detach()]).tolist()
    batch, experts = chosen.shape
    of_expert = [{row: weights[row][expert] for row in range(batch) if picks[row][expert]} for expert in range(experts)]
    is_one = all(weight == 1 for of_rows in of_expert for weight in of_rows.values())
    kept = None if is_one and not gates.requires_grad else gates
    return [
        Selection(
            batch,
            of_rows,
            None if len(of_rows) == batch else torch.tensor(list(of_rows), device=gates.device),
            kept,
            expert,
        )
        if of_rows
        else None
        for expert, of_rows in enumerate(of_expert)
    ]


@dataclass
class BlockRouting:
    """The decision of one router in one pass, for the rows of one adapter."""

    experts: tuple[str, ...]
    decision: Decision
    selections: list[Selection | None]


@dataclass
class RoutingPass(PromptPass):
    """One forward pass: whose prompts it holds, and what has been decided for them so far.

    Attributes:
        adapter_rows: Rows of each adapter, `None` for all rows.
        forced: The route to follow instead of asking the routers, already of `rows` rows; `prompt` is `None` then.
        routings: Adapter -> block -> decision.
        routed_blocks: Blocks that have been reached.
        prepared: What the decode steps of a generation compute, `None` outside `generate`.
        is_decode_step: Whether the running forward is a decode step that may use what is prepared.
        is_merged: Whether the chosen experts are in the backbone's weights.
    """

    adapter_rows: dict[str, list[int] | None] = field(default_factory=dict)
    forced: Route | None = None
    routings: dict[str, dict[str, BlockRouting]] = field(default_factory=dict)
    routed_blocks: set[str] = field(default_factory=set)
    prepared: PreparedExperts | None = None
    is_decode_step: bool = False
    is_merged: bool = False

    @property
    def adapter(self) -> str | None:
        """The adapter that serves all rows, `None` where rows have their own."""
        if len(self.adapter_rows) != 1:
            return None
        ((adapter, rows),) = self.adapter_rows.items()
        return adapter if rows is None else None

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


class _RoutingInForce(threading.local):
    def __init__(self) -> None:
        self.forced: Route | None = None
        self.merged: Route | None = None
        self.merge_into: ExitStack | None = None
        self.adapter_names: list[str] | None = None
        self.records: list[Route] | None = None


class Dispatcher(PromptPasses):
    """Holds what is in force: besides passes and generations, a forced route and the adapters of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self._routing_in_force = _RoutingInForce()

    def begin(self, prompt_pass: PromptPass) -> None:
        """As [`PromptPasses.begin`]; in a generation every forward but the first is a decode step."""
        in_generation = self._in_force.generation is not None
        follows = in_generation and self.following() is prompt_pass
        super().begin(prompt_pass)
        if not isinstance(prompt_pass, RoutingPass):
            return
        prompt_pass.is_merged = self.merged is not None
        if in_generation and prompt_pass.prepared is None:
            prompt_pass.prepared = PreparedExperts()
        # Autocast casts weights on their way into every product, and gradients need the parameters themselves.
        prompt_pass.is_decode_step = follows and not torch.is_grad_enabled() and not _is_autocast_enabled()

    def current_selection(self, adapter: str, block: str, expert: int) -> Selection | None:
        """What an expert of the running pass does, `None` for nothing.

        Raises:
            RuntimeError: If no pass is running, or it has not reached the block.
        """
        running: RoutingPass | None = self.current
        if running is None:
            raise RuntimeError(f"A layer of {block} was called outside the model: there is no route. Call the model.")
        return running.selection(adapter, block, expert)

    @property
    def forced(self) -> Route | None:
        """The route that [`Dispatcher.forcing`] put in force."""
        return self._routing_in_force.forced

    @property
    def adapter_names(self) -> list[str] | None:
        """The adapter of each row, where rows have their own."""
        return self._routing_in_force.adapter_names

    @contextmanager
    def forcing(self, route: Route | None) -> Iterator[None]:
        """In force: a given route, instead of what the routers would decide; `None` changes nothing."""
        outer = self.forced
        self._routing_in_force.forced = outer if route is None else route
        try:
            yield
        finally:
            self._routing_in_force.forced = outer

    @property
    def merged(self) -> Route | None:
        """The route that this thread has merged into the backbone's weights."""
        return self._routing_in_force.merged

    @property
    def merge_into(self) -> ExitStack | None:
        """Where the generation of this thread that asked for it is to merge its route, once that is known."""
        return self._routing_in_force.merge_into

    @contextmanager
    def merging(self, stack: ExitStack) -> Iterator[None]:
        """In force: the wish for a merged route, which ends with `stack`."""
        self._routing_in_force.merge_into = stack
        try:
            yield
        finally:
            self._routing_in_force.merge_into = None

    @contextmanager
    def following_merged(self, route: Route) -> Iterator[None]:
        """In force: a route whose experts are in the backbone's weights, so that no layer computes any."""
        if self.current is not None:
            self.current.is_merged = True
        self._routing_in_force.merged = route
        try:
            yield
        finally:
            self._routing_in_force.merged = None
            if self.current is not None:
                self.current.is_merged = False

    @property
    def records(self) -> list[Route] | None:
        """Where the routes of generations go while a caller records them."""
        return self._routing_in_force.records

    @contextmanager
    def recording(self) -> Iterator[list[Route]]:
        """In force: a list that gets the route of each generation at its end."""
        outer, self._routing_in_force.records = self.records, []
        try:
            yield self._routing_in_force.records
        finally:
            self._routing_in_force.records = outer

    @contextmanager
    def serving(self, adapter_names: list[str] | None) -> Iterator[None]:
        """In force: an adapter for each row."""
        outer, self._routing_in_force.adapter_names = self.adapter_names, adapter_names
        try:
            yield
        finally:
            self._routing_in_force.adapter_names = outer


def _is_autocast_enabled() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


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


def chosen_modules(routers: Mapping[str, Any], route: Route, adapter: str) -> dict[str, float]:
    """Path of each module that a route of one row chose -> its gate.

    Args:
        routers: The blocks' router layers, by the block's path.
        route: A route of one row.
        adapter: The adapter whose route it is.

    Raises:
        MiLoraError: If the route is not of this adapter and backbone.
    """
    gates: dict[str, float] = {}
    for block, router in routers.items():
        if adapter not in router.experts:
            continue
        experts = router.experts[adapter]
        decision = follow(route, block, experts, None, torch.device("cpu"))
        of_block = zip(experts, decision.gates[0].tolist(), strict=True)
        gates |= {f"{block}.{expert}": gate for expert, gate in of_block if gate != 0}
    return gates
