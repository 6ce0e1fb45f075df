"""A pass whose layers are computed one by one: prompts, training, and steps without preparation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from milora.tuners.milora.plans.formulas import add_expert
from milora.tuners.milora.routed import RoutedPrompts, Selection
from milora_core.errors import MiLoraError


class PassPlan:
    """See [`milora.tuners.plan.Plan`]. The routers fill in `prompts` block by block.

    `adapted`: adapter -> (rows, tokens), bool: the tokens that it changes; all if missing.
    """

    is_packed = False

    def __init__(self, prompts: RoutedPrompts, adapted: Mapping[str, Tensor]) -> None:
        self.prompts = prompts
        self.adapted = {adapter: tokens.cpu() for adapter, tokens in adapted.items()}
        self._tokens: dict[Any, tuple[Tensor, Tensor]] = {}

    def forward(self, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See [`milora.tuners.plan.Plan.forward`]."""
        return self.add(layer, x, layer.base_layer(x, *args, **kwargs))

    def rows_of(self, rows: int) -> dict[str, list[int]] | None:
        """See [`milora.tuners.plan.Plan.rows_of`]."""
        every = list(range(rows))
        return {adapter: every if own is None else own for adapter, own in self.prompts.adapter_rows.items()}

    def add(self, layer: Any, x: Tensor, result: Tensor) -> Tensor:
        """The base layer's output with the experts of all rows added; without gradients it may be overwritten."""
        prompts, summed = self.prompts, result
        for adapter in prompts.adapter_rows:
            selection = prompts.selection(layer, adapter)
            if selection is None:
                continue
            if summed.data_ptr() == x.data_ptr():
                summed = summed.clone()  # A base layer may return its input.
            summed = self._add(layer, adapter, selection, x, summed)
        return summed.to(result.dtype)

    def _add(self, layer: Any, adapter: str, selection: Selection, x: Tensor, result: Tensor) -> Tensor:
        shape = result.shape
        x, result = (self._by_row(layer, adapter, tensor) for tensor in (x, result))
        index, gate = selection.rows, selection.gate()
        if adapter in self.adapted:
            index, place = self._chosen_tokens(adapter, selection, x)
            gate = None if gate is None else gate.index_select(0, place.to(gate.device))
            x, result = x.flatten(0, 1), result.flatten(0, 1)
        elif index is not None:
            index = index.to(x.device)
        return add_expert(layer, adapter, x, result, index, gate, self.prompts.dora_scale).reshape(shape)

    def _by_row(self, layer: Any, adapter: str, tensor: Tensor) -> Tensor:
        """A layer's input as (rows, tokens, features); some blocks flatten it to (rows * tokens, features)."""
        rows = self.prompts.rows
        if tensor.shape[0] == rows and tensor.dim() > 2:
            return tensor
        if tensor.dim() > 2 or tensor.shape[0] % rows != 0:
            raise MiLoraError(
                f"A module of {layer.expert_places[adapter].block} got an input of shape {tuple(tensor.shape)} for a "
                f"batch of {rows} prompts, so each prompt's tokens cannot be found. Exclude this module from "
                "target_modules."
            )
        return tensor.reshape(rows, -1, tensor.shape[-1])

    def _chosen_tokens(self, adapter: str, selection: Selection, x: Tensor) -> tuple[Tensor, Tensor]:
        """The adapted tokens of the rows that chose an expert, of rows * tokens, and each one's place in the gates."""
        rows = list(selection.weights)
        key = (adapter, tuple(rows), x.device)
        if key not in self._tokens:
            adapted = self.adapted[adapter]
            place, token = adapted[rows].nonzero(as_tuple=True)
            index = torch.tensor(rows)[place] * adapted.shape[1] + token
            self._tokens[key] = index.to(x.device), place.to(x.device)
        return self._tokens[key]
