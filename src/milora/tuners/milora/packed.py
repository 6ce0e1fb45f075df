"""A packed pass: one row with the tokens of many requests side by side, each with its own adapter and route.

The serving engine runs its steps this way: single tokens of texts that are being generated, and chunks of prompts. To
run one, enter a [`milora.tuners.context.Scope`] with [`PackedTokens`] and call the backbone with `input_ids` of shape
(1, tokens). Routers decide for the prompts whose deciding tokens are in the pass. LoRA layers change the adapted tokens
only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from milora.tuners.milora.packed_rows import PackedModules, PackedRows
from milora.tuners.milora.plans.formulas import add_expert, dora_scale
from milora_core.routing import Decision, Route


class PackedRoute:
    """The route of one request. Routers fill it in block by block in the pass that decides it.

    On a GPU the decisions stay on the device during the pass. They are copied to the host together, when they are read.

    Args:
        adapter: The adapter's name in the model.
    """

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        self._gates: dict[str, list[float]] = {}
        self._probabilities: dict[str, list[float]] = {}
        self._experts: dict[str, tuple[str, ...]] = {}
        self._unread: dict[str, Decision] = {}

    @property
    def gates(self) -> dict[str, list[float]]:
        """Block -> the gate of each of its experts, in the router's order. Waits for decisions of the running pass."""
        if self._unread:
            self._read()
        return self._gates

    def fixed(self, block: str, experts: int) -> None:
        """Sets all gates of a block to 1: a LoRA adapter has no router."""
        self._gates[block] = [1.0] * experts

    def decided(self, block: str, experts: tuple[str, ...], decision: Decision) -> None:
        """Adds the decision of a block's router for the request.

        Args:
            block: The block's path.
            experts: The block's experts, in the router's order.
            decision: A decision of one row.
        """
        self._experts[block] = experts
        self._unread[block] = decision

    def is_decided(self, block: str) -> bool:
        """Whether the router of a block has decided."""
        return block in self._experts

    def gate(self, layer: Any) -> float:
        """The gate of a layer; 0 if it was not chosen or the adapter does not adapt it."""
        place = layer.expert_places.get(self.adapter)
        return 0.0 if place is None else self.gates[place.block][place.expert]

    def route(self) -> Route | None:
        """The route as a value of one row, on the CPU; `None` for a LoRA adapter."""
        if not self._experts:
            return None
        blocks, of_blocks = tuple(self._experts), self.gates
        experts = tuple(dict.fromkeys(expert for of_block in self._experts.values() for expert in of_block))
        gates = torch.zeros(len(blocks), 1, len(experts))
        probabilities = torch.zeros_like(gates)
        for index, block in enumerate(blocks):
            columns = torch.tensor([experts.index(expert) for expert in self._experts[block]])
            gates[index, 0, columns] = torch.tensor(of_blocks[block])
            probabilities[index, 0, columns] = torch.tensor(self._probabilities[block])
        return Route(gates, probabilities, experts, blocks)

    def _read(self) -> None:
        """Copies the unread decisions to the host, all at once."""
        decisions = self._unread.values()
        parts = [part[0] for decision in decisions for part in (decision.gates, decision.probabilities)]
        values = iter(torch.cat(parts).tolist())
        for block in self._unread:
            count = len(self._experts[block])
            self._gates[block] = list(islice(values, count))
            self._probabilities[block] = list(islice(values, count))
        self._unread = {}


@dataclass(frozen=True)
class Segment:
    """Adjacent tokens of one request in a packed pass.

    Args:
        start: The place of the first token in the pass.
        count: Number of tokens.
        route: The request's adapter and route, known or to be decided; `None` for the bare backbone.
        bare: Number of tokens at the beginning that the adapter does not change (late adaptation).
        deciding: The first of the segment's tokens that the routers read, and their number; `None` if the routers
            decide nothing for this segment.
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
        outputs: Places of the tokens whose logits are computed. The language model's head gets only these.
        modules: The model's adapters for the device's kernel. Without them torch's operators compute everything.
    """

    def __init__(
        self, segments: Sequence[Segment], outputs: Sequence[int], modules: PackedModules | None = None
    ) -> None:
        self.segments = segments
        self.outputs = outputs
        self.plan = PackedPlan(self, modules)
        self._deciding = [segment for segment in segments if segment.deciding is not None]

    def decide(self, router: Any, hidden: Tensor) -> None:
        """Runs the router of a block for the prompts that are decided in this pass.

        Args:
            router: The block's [`milora.tuners.milora.router.RouterLayer`].
            hidden: The block's input, (1, tokens, hidden).
        """
        for segment in self._deciding:
            route, deciding = segment.route, segment.deciding
            assert route is not None
            assert deciding is not None
            if route.adapter not in router.projection or route.is_decided(router.block):
                continue
            first, count = segment.start + deciding[0], deciding[1]
            prompt = torch.ones(1, count, dtype=torch.bool, device=hidden.device)
            decision = router.decide(route.adapter, hidden[:, first : first + count], prompt)
            route.decided(router.block, router.experts[route.adapter], decision)
            self.plan.decided(route, router.block, decision)


class PackedPlan:
    """Defines how adapted layers compute a packed pass; see [`milora.tuners.plan.Plan`].

    The device's kernel takes the adapters that it supports. Torch's operators compute the rest, one adapter after the
    other.

    Args:
        tokens: The tokens of the pass.
        modules: See [`PackedTokens`].
    """

    is_packed = True

    def __init__(self, tokens: PackedTokens, modules: PackedModules | None) -> None:
        self.tokens = tokens
        self._modules = modules
        self._adapted = [
            (segment.start + segment.bare, segment.count - segment.bare, segment.route)
            for segment in tokens.segments
            if segment.route is not None and segment.count > segment.bare
        ]
        self._rows = PackedRows(modules, self._adapted) if modules is not None and self._adapted else None

    def decided(self, route: PackedRoute, block: str, decision: Decision) -> None:
        """Passes a router's decision to the kernel."""
        if self._rows is not None:
            self._rows.decided(route, block, decision)

    def forward(self, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See [`milora.tuners.plan.Plan.forward`]."""
        result: Tensor = layer.base_layer(x, *args, **kwargs)
        if not self._adapted:
            return result
        if result.data_ptr() == x.data_ptr():
            result = result.clone()  # A base layer may return its input.
        is_added = self._rows is not None and self._rows.add_to(layer, result, x)
        left = self._left_by_kernel(layer, is_added=is_added)
        if left:
            self._add_with_torch(layer, result.view(-1, result.shape[-1]), x.reshape(-1, x.shape[-1]), left)
        return result

    def _left_by_kernel(self, layer: Any, *, is_added: bool) -> list[tuple[int, int, PackedRoute]]:
        """The tokens whose adapters the kernel does not support in a layer."""
        modules = self._modules
        if modules is None or not is_added:
            return self._adapted
        if layer not in modules.unsupported:
            return []
        return [part for part in self._adapted if not modules.is_served(layer, part[2].adapter)]

    @staticmethod
    def _add_with_torch(layer: Any, result: Tensor, x: Tensor, parts: Sequence[tuple[int, int, PackedRoute]]) -> None:
        """Adds one adapter after the other to (tokens, d_out)."""
        singles: dict[str, tuple[list[int], list[float]]] = {}
        for first, count, route in parts:
            gate = route.gate(layer)
            if gate == 0:
                continue
            if count == 1:
                rows, gates = singles.setdefault(route.adapter, ([], []))
                rows.append(first)
                gates.append(gate)
            else:
                part = result.narrow(0, first, count)
                _add(layer, route.adapter, x.narrow(0, first, count), part, None, [gate] * count)
        for adapter, (rows, gates) in singles.items():
            _add(layer, adapter, x, result, torch.tensor(rows, device=result.device), gates)

    def rows_of(self, rows: int) -> dict[str, list[int]]:
        """See [`milora.tuners.plan.Plan.rows_of`]. Each token is a row.

        Args:
            rows: Number of tokens of the module's input: all tokens of the pass, or those whose logits are computed.
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
