"""The decisions for the prompts of a batch: row -> (adapter, route), written by routers and read by plans."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from milora.tuners.context import Prompts
from milora.tuners.grouped import Share
from milora.tuners.milora.plans.formulas import dora_scale
from milora_core.errors import MiLoraError
from milora_core.routing import Decision, Route


class Place(NamedTuple):
    """An expert's block, and its index among the block's experts."""

    block: str
    expert: int


@dataclass(frozen=True)
class Selection:
    """The rows of a batch that chose one expert of one adapter, and their gates.

    Attributes:
        weights: Row -> gate, on the host.
        rows: (chosen rows), int64, on the device; `None` if every row of the batch chose it.
        gates: (adapter's rows, experts), float32; `None` if every gate is exactly 1 and has no gradient.
        places: (chosen rows), int64: their indices in `gates`; `None` for all of them.
        column: The expert's column in `gates`.
    """

    weights: dict[int, float]
    rows: Tensor | None
    gates: Tensor | None
    places: Tensor | None
    column: int

    def gate(self) -> Tensor | None:
        """(chosen rows), float32, or `None`. Selected where it is used: a recomputation builds its own graph."""
        if self.gates is None:
            return None
        column = self.gates[:, self.column]
        return column if self.places is None else column.index_select(0, self.places)

    @property
    def common_weight(self) -> float | None:
        """The common gate of all rows of the batch, `None` if rows differ."""
        weights = set(self.weights.values())
        return weights.pop() if self.rows is None and len(weights) == 1 else None


@dataclass(frozen=True)
class BlockRouting:
    """The decision of one router for the rows of one adapter."""

    experts: tuple[str, ...]
    decision: Decision
    selections: list[Selection | None]


def select(gates: Tensor, chosen: Tensor, rows: list[int] | None, batch: int) -> list[Selection | None]:
    """One [`Selection`] per expert, `None` for experts that no row chose. Reads the decision on the host, once.

    `gates`, float32, and `chosen`, bool, are (adapter's rows, experts); `rows` are the adapter's among the rows of the
    batch, `None` for all.
    """
    picks, values = torch.stack([chosen.to(gates.dtype), gates.detach()]).tolist()
    count, experts = chosen.shape
    own = list(range(count)) if rows is None else rows
    places = [[place for place in range(count) if picks[place][expert]] for expert in range(experts)]
    is_one = all(values[place][expert] == 1 for expert in range(experts) for place in places[expert])
    kept = None if is_one and not gates.requires_grad else gates

    def index(numbers: list[int], all_of: int) -> Tensor | None:
        return None if numbers == list(range(all_of)) else torch.tensor(numbers, device=gates.device)

    return [
        Selection(
            {own[place]: values[place][expert] for place in of_expert},
            index([own[place] for place in of_expert], batch),
            kept,
            index(of_expert, count),
            expert,
        )
        if of_expert
        else None
        for expert, of_expert in enumerate(places)
    ]


@dataclass
class RoutedPrompts(Prompts):
    """The prompts of a batch with what their routers decided.

    Attributes:
        adapter_rows: Adapter -> its rows, `None` for all rows.
        forced: The route of `rows` rows to follow instead of the routers.
        routings: Adapter -> block -> decision.
        routed_blocks: Blocks that have been routed.
        bare: Number of cached tokens that the bare backbone made (late adaptation); 0 if experts changed the prompt.
    """

    adapter_rows: Mapping[str, list[int] | None] = field(default_factory=dict)
    forced: Route | None = None
    routings: dict[str, dict[str, BlockRouting]] = field(default_factory=dict)
    routed_blocks: set[str] = field(default_factory=set)
    bare: int = 0

    @property
    def adapter(self) -> str | None:
        """The adapter of all rows, `None` if rows have different adapters."""
        return next((adapter for adapter, rows in self.adapter_rows.items() if rows is None), None)

    def selection(self, layer: Any, adapter: str) -> Selection | None:
        """The rows of an adapter that chose a layer, `None` for none.

        Raises:
            RuntimeError: If the layer's block has not been routed, because the layer was called outside the block.
        """
        place: Place | None = layer.expert_places.get(adapter)
        if place is None:
            return None
        routing = self.routings.get(adapter, {}).get(place.block)
        if routing is None:
            raise RuntimeError(
                f"A layer of {place.block} was called for adapter {adapter!r} before the block was: there is no route "
                "yet. Call the whole model."
            )
        return routing.selections[place.expert]

    def shares(self, layer: Any, rows: int) -> Iterator[Share]:
        """Each adapter's share of the rows in a layer."""
        for adapter, own in self.adapter_rows.items():
            place = layer.expert_places.get(adapter)
            if place is not None:
                yield Share(adapter, own, self.routings[adapter][place.block].decision.gates[:, place.expert])

    def dora_scale(self, layer: Any, adapter: str) -> Tensor:
        """DoRA's factor, (d_out), computed once for these prompts: weights may change in place before the next ones."""
        key = ("dora", layer, adapter)
        if key not in self.values:
            self.values[key] = dora_scale(layer, adapter)
        scale: Tensor = self.values[key]
        return scale

    def route(self) -> Route:
        """The decisions of all adapters as a value; rows without an adapter have gate and probability 0."""
        blocks = tuple(dict.fromkeys(block for of_adapter in self.routings.values() for block in of_adapter))
        decided = [(adapter, block, routing) for adapter, of in self.routings.items() for block, routing in of.items()]
        experts = tuple(dict.fromkeys(expert for _, _, routing in decided for expert in routing.experts))
        device = decided[0][2].decision.gates.device if decided else None
        gates = torch.zeros(len(blocks), self.rows, len(experts), device=device)
        probabilities = torch.zeros_like(gates)
        for adapter, block, routing in decided:
            rows = self.adapter_rows[adapter]
            index = torch.arange(self.rows, device=device) if rows is None else torch.tensor(rows, device=device)
            columns = torch.tensor([experts.index(expert) for expert in routing.experts], device=device)
            place = (blocks.index(block), index[:, None], columns[None, :])
            gates[place] = routing.decision.gates.detach().to(gates)
            probabilities[place] = routing.decision.probabilities.detach().to(gates)
        return Route(gates, probabilities, experts, blocks)

    def pick(self, rows: list[int]) -> RoutedPrompts:
        """See [`Prompts.pick`]."""
        adapter_rows = {
            adapter: None if own is None else [place for place, row in enumerate(rows) if row in own]
            for adapter, own in self.adapter_rows.items()
        }
        route = self.route()[rows]
        return RoutedPrompts(len(rows), None, self.use, adapter_rows=adapter_rows, forced=route, bare=self.bare)

    def for_rows(self, rows: int) -> RoutedPrompts:
        """The same for a pass with another number of rows, which is possible if all rows are equal.

        Raises:
            MiLoraError: If they are not.
        """
        if rows == self.rows:
            return self
        gates = self.route().gates
        if self.adapter is None or not bool((gates == gates[:, :1]).all()):
            raise MiLoraError(
                f"The cache was filled by {self.rows} prompts with different adapters or routes, but the pass has "
                f"{rows} rows, so rows cannot be matched to prompts. Rearrange rows with the cache's own methods "
                "(batch_select_indices, batch_repeat_interleave, reorder_cache)."
            )
        return self.pick([0] * rows)
