"""Routing statistics of training, accumulated on the device and read when logged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from milora.tuners.milora.routed import BlockRouting


class RoutingStatistics:
    """Means over training passes, without device synchronisation until [`RoutingStatistics.summary`]."""

    def __init__(self) -> None:
        self._passes = 0
        self._balance: Any = 0.0
        self._choices: dict[str, Any] = {}

    def record(self, balance: Tensor, routings: Mapping[str, BlockRouting]) -> None:
        """Adds a pass: its load-balancing loss and the decisions of its blocks."""
        self._passes += 1
        self._balance = self._balance + balance.detach()
        for routing in routings.values():
            counts = routing.decision.chosen.sum(dim=0).to(balance.device, torch.float32)
            for expert, count in zip(routing.experts, counts.unbind(), strict=True):
                self._choices[expert] = self._choices.get(expert, 0) + count

    def summary(self) -> dict[str, float]:
        """`load_balancing_loss` and `expert_share/{expert}`; empty before the first pass."""
        if not self._passes:
            return {}
        names = list(self._choices)
        values = torch.stack([self._balance / self._passes, *self._choices.values()]).tolist()
        total = sum(values[1:])
        shares = {f"expert_share/{name}": count / total for name, count in zip(names, values[1:], strict=True)}
        return {"load_balancing_loss": values[0], **shares}
