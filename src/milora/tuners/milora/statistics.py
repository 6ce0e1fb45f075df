"""Routing statistics of training, accumulated on the device and read when logged."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from milora.tuners.milora.routed import BlockRouting


class RoutingStatistics:
    """Means over training passes, without device synchronisation until [`RoutingStatistics.summary`]."""

    def __init__(self) -> None:
        self._warned = False
        self._clear()

    def _clear(self) -> None:
        self._passes = 0
        self._balance: Tensor | None = None
        self._choices: dict[str, Tensor] = {}

    def record(self, balance: Tensor, routings: Mapping[str, BlockRouting]) -> None:
        """Adds a pass: its load-balancing loss and the decisions of its blocks."""
        self._passes += 1
        balance = balance.detach()
        self._balance = balance if self._balance is None else self._balance + balance
        for routing in routings.values():
            counts = routing.decision.chosen.sum(dim=0).to(balance.device, torch.float32)
            for expert, count in zip(routing.experts, counts.unbind(), strict=True):
                self._choices[expert] = self._choices.get(expert, 0) + count

    def summary(self, reset: bool) -> dict[str, float]:
        """`load_balancing_loss` and `expert_share/{expert}`; empty before the first pass."""
        if self._balance is None:
            return {}
        names = list(self._choices)
        values = torch.stack([self._balance / self._passes, *self._choices.values()]).tolist()
        total = sum(values[1:])
        shares = {f"expert_share/{name}": count / total for name, count in zip(names, values[1:], strict=True)}
        if reset:
            self._clear()
        return {"load_balancing_loss": values[0], **shares}

    def warn_without_labels(self) -> None:
        """Warns once that a training pass had no labels that mark the prompt."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                "A training pass had no labels, so each whole row counts as the prompt. If rows contain completions, "
                "mark the prompt: `with model.use_prompt(mask):`.",
                stacklevel=2,
            )
