"""A pass whose one row holds the tokens of many requests side by side, each with its own adapter and route.

The serving engine runs its steps this way: single tokens of texts that are being generated, and pieces of prompts.
A caller enters a [`milora.tuners.context.Scope`] with [`PackedTokens`] and calls the backbone with `input_ids` of
shape (1, tokens). Routers decide for the prompts whose deciding tokens are in the pass, and LoRA layers change the
tokens that are adapted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from milora.tuners.milora.packed_rows import PackedModules, PackedRows
from milora.tuners.milora.plans.formulas import add_expert, dora_scale
from milora.tuners.milora.routed import BlockRouting
from milora_core.routing import Route


class PackedRoute:
    """The route of one request, filled in block by block in the pass that decides it.

    Args:
        adapter: The adapter's name in the model.

    Attributes:
        gates: Block -> the gate of each of its experts, in the router's order.
        routings: Block -> decision; empty for a LoRA adapter, which has no routers to ask.
    """

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        self.gates: dict[str, list[float]] = {}
        self.routings: dict[str, BlockRouting] = {}

    def decided(self, block: str, routing: BlockRouting) -> None:
        """Takes in what the router of a block decided for the request's one prompt."""
        self.routings[block] = routing
        self.gates[block] = routing.decision.gates[0].tolist()

    def gate(self, layer: Any) -> float:
        """The gate of a layer; 0 where it was not chosen or the adapter has no part in it."""
        place = layer.expert_places.get(self.adapter)
        return 0.0 if place is None else self.gates[place.block][place.expert]

    def route(self) -> Route | None:
        """The route as a value of one row, on the CPU; `None` for a LoRA adapter."""
        if not self.routings:
            return None
        blocks = tuple(self.routings)
        experts = tuple(dict.fromkeys(expert for routing in self.routings.values() for expert in routing.experts))
        gates = torch.zeros(len(blocks), 1, len(experts))
        probabilities = torch.zeros_like(gates)
        for index, routing in enumerate(self.routings.values()):
            columns = torch.tensor([experts.index(expert) for expert in routing.experts])
            gates[index, 0, columns] = routing.decision.gates[0].cpu()
            probabilities[index, 0, columns] = routing.decision.probabilities[0].cpu()
        return Route(gates, probabilities, experts, blocks)


@dataclass(frozen=True)
class Segment:
    """Adjacent tokens of one request in a packed pass.

    Args:
        start: Place of the first token in the pass.
        count: How many there are.
        route: The request's adapter and route, known or to be decided; `None` for the bare backbone.
        bare: How many tokens at the beginning the adapter leaves to the bare backbone (late adaptation).
        deciding: The first of the segment's tokens that the routers read, and how many; `None` where they decide
            nothing in this pass.
    """

    start: int
    count: int
    route: PackedRoute | None = None
    bare: int = 0
    deciding: tuple[int, int] | None = None


class PackedTokens:
    """The tokens of a packed pass.

    Args:
        segments: In the order of the tokens, without gaps.
        outputs: Places of the tokens whose logits are computed, which the language model's head is given alone.
        modules: The model's adapters for the native kernel; without them torch's operators compute all.
    """

    def __init__(
        self, segments: Sequence[Segment], outputs: Sequence[int], modules: PackedModules | None = None
    ) -> None:
        self.segments = segments
        self.outputs = outputs
        self.plan = PackedPlan(self, modules)
        self._deciding = [segment for segment in segments if segment.deciding is not None]

    def decide(self, router: Any, hidden: Tensor) -> None:
        """Asks the router of a block, from the block's input (1, tokens, hidden), for the prompts that it decides.

        Args:
            router: The block's [`milora.tuners.milora.router.RouterLayer`].
            hidden: The input of the block.
        """
        for segment in self._deciding:
            route, deciding = segment.route, segment.deciding
            assert route is not None
            assert deciding is not None
            if route.adapter not in router.projection or router.block in route.gates:
                continue
            first, count = segment.start + deciding[0], deciding[1]
            prompt = torch.ones(1, count, dtype=torch.bool, device=hidden.device)
            decision = router.decide(route.adapter, hidden[:, first : first + count], prompt)
            route.decided(router.block, BlockRouting(router.experts[route.adapter], decision, []))
            self.plan.decided(route)


class PackedPlan:
    """See [`milora.tuners.plan.Plan`]: how adapted layers compute a packed pass.

    Args:
        tokens: The tokens of the pass.
        modules: See [`PackedTokens`].
    """

    is_packed = True

    def __init__(self, tokens: PackedTokens, modules: PackedModules | None) -> None:
        self.tokens = tokens
        self._modules = modules
        self._singles: list[tuple[int, PackedRoute]] = []
        self._spans: list[tuple[int, int, PackedRoute]] = []
        for segment in tokens.segments:
            first, count = segment.start + segment.bare, segment.count - segment.bare
            if segment.route is not None and count == 1:
                self._singles.append((first, segment.route))
            elif segment.route is not None and count > 1:
                self._spans.append((first, count, segment.route))
        self._rows: PackedRows | None = None
        if modules is not None and self._singles:
            self._rows = PackedRows(modules, *zip(*self._singles, strict=True))

    def decided(self, route: PackedRoute) -> None:
        """Takes in what a router has decided."""
        if self._rows is not None:
            self._rows.decided(route)

    def forward(self, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See [`milora.tuners.plan.Plan.forward`]."""
        result: Tensor = layer.base_layer(x, *args, **kwargs)
        if not self._singles and not self._spans:
            return result
        if result.data_ptr() == x.data_ptr():
            result = result.clone()  # A base layer may return its input.
        flat, inputs = result.view(-1, result.shape[-1]), x.reshape(-1, x.shape[-1])
        for first, count, route in self._spans:
            gate = route.gate(layer)
            if gate != 0:
                part = flat.narrow(0, first, count)
                _add(layer, route.adapter, inputs.narrow(0, first, count), part, None, [gate] * count)
        if self._singles:
            is_added = self._rows is not None and self._rows.add_to(layer, flat, inputs)
            for adapter, (rows, gates) in self._singles_without_kernel(layer, is_added=is_added).items():
                _add(layer, adapter, inputs, flat, torch.tensor(rows, device=flat.device), gates)
        return result

    def _singles_without_kernel(self, layer: Any, *, is_added: bool) -> dict[str, tuple[list[int], list[float]]]:
        """Adapter -> its single tokens and their gates, of those that torch's operators add in a layer."""
        modules = self._modules
        by_adapter: dict[str, tuple[list[int], list[float]]] = {}
        if is_added and modules is not None and not modules.has_others(layer):
            return by_adapter
        for first, route in self._singles:
            if is_added and modules is not None and modules.is_served(layer, route.adapter):
                continue
            gate = route.gate(layer)
            if gate != 0:
                rows, gates = by_adapter.setdefault(route.adapter, ([], []))
                rows.append(first)
                gates.append(gate)
        return by_adapter

    def rows_of(self, rows: int) -> dict[str, list[int]]:
        """See [`milora.tuners.plan.Plan.rows_of`]; here each token is a row.

        Args:
            rows: How many tokens the module is given: those of the pass, or those whose logits are computed.
        """
        owners = [route for segment in self.tokens.segments for route in [segment.route] * segment.count]
        if rows != len(owners):
            owners = [owners[place] for place in self.tokens.outputs]
        by_adapter: dict[str, list[int]] = {}
        for row, route in enumerate(owners):
            if route is not None:
                by_adapter.setdefault(route.adapter, []).append(row)
        return by_adapter


def _add(layer: Any, adapter: str, x: Tensor, result: Tensor, index: Tensor | None, gates: Sequence[float]) -> None:
    gate = None if all(value == 1 for value in gates) else torch.tensor(gates, device=x.device)
    changed = add_expert(layer, adapter, x, result, index, gate, dora_scale)
    if changed.data_ptr() != result.data_ptr():
        result.copy_(changed)
