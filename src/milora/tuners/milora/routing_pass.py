"""One forward pass of a MiLoRA model: whose prompts it holds, and what has been decided for them so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from milora.tuners.milora.decoding import PreparedExperts
from milora.tuners.milora.selection import BlockRouting
from milora.tuners.prompt_pass import PromptPass
from milora_core.errors import MiLoraError
from milora_core.routing import Route


@dataclass
class RoutingPass(PromptPass):
    """What routers write in a pass, and experts read.

    Attributes:
        adapter_rows: Rows of each adapter, `None` for all rows.
        forced: The route to follow instead of asking the routers, already of `rows` rows; `prompt` is `None` then.
        routings: Adapter -> block -> decision.
        routed_blocks: Blocks that have been reached.
        prepared: What the decode steps of a generation compute; `None` outside `generate`, and where rows have adapters
            of their own.
        is_decode_step: Whether the running forward is a decode step that may use what is prepared.
        is_merged: Whether the chosen experts are in the backbone's weights.
    """

    adapter_rows: Mapping[str, list[int] | None] = field(default_factory=dict)
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

    def places(self, adapter: str, device: torch.device) -> Tensor:
        """(its rows), int64: an adapter's rows as an index on a device, made once a pass."""
        key = ("places", adapter, device)
        if key not in self.values:
            rows = self.adapter_rows[adapter]
            self.values[key] = torch.tensor(range(self.rows) if rows is None else rows, device=device)
        index: Tensor = self.values[key]
        return index

    def check_rows(self, x: Tensor) -> None:
        """Raises a [`MiLoraError`] if a module's input does not have the batch's rows, which may have own adapters."""
        if x.shape[0] != self.rows:
            raise MiLoraError(
                f"An adapted module was given an input of shape {tuple(x.shape)} for a batch of {self.rows} rows: "
                "batch and tokens are flattened before it, so rows with different adapters cannot be told apart there. "
                "Serve one adapter at a time."
            )

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
