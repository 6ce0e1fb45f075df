"""What a router's decision means for each expert of its block: for which rows it runs, and with which weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from milora_core.routing import Decision


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


Routings = Mapping[str, Mapping[str, BlockRouting]]
"""Adapter -> block -> decision."""


def selection_of(routings: Routings, adapter: str, block: str, expert: int) -> Selection | None:
    """What an expert of an adapter does, `None` for nothing; a block that has not been reached has no answer.

    Raises:
        RuntimeError: If the block has not been routed, because its layers were called outside the block.
    """
    return routing_of(routings, adapter, block).selections[expert]


def routing_of(routings: Routings, adapter: str, block: str) -> BlockRouting:
    """What a block's router decided for an adapter's rows.

    Raises:
        RuntimeError: If the block has not been routed, because its layers were called outside the block.
    """
    routing = routings.get(adapter, {}).get(block)
    if routing is None:
        raise RuntimeError(
            f"A layer of {block} was called for adapter {adapter!r} before the block was: there is no route yet. "
            "Call the whole model."
        )
    return routing
