"""The adapters of a model as a device's kernel for packed passes reads them, and the gates of a pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from milora.tuners.milora.plans.formulas import dora_scale, is_dora, is_plain
from milora_core.kernels.packed_lora import PackedOperator
from milora_core.routing import Decision


class _Experts(NamedTuple):
    """The experts of an adapter in a block: the columns of their modules, and their indices in the router's order."""

    columns: list[int]
    indices: list[int]
    on_device: tuple[Tensor, Tensor]
    """Both as int64."""


class _Gates(NamedTuple):
    """The gates of a route."""

    values: Tensor
    """(columns), float32, on the device: the gate of each module, 0 where it is not known yet."""
    chosen: frozenset[int] | None
    """The columns whose gate is not 0; `None` if a router has yet to decide."""


class PackedModules:
    """The adapters of all layers, by number.

    Args:
        model: The backbone with PEFT's layers.
        capacity: The maximum number of adapters.
        device: The device of the backbone.
        operator: The device's kernel.

    Attributes:
        numbers: Adapter -> its number.
        unsupported: Layers with an adapter that the kernel does not support.
    """

    def __init__(self, model: nn.Module, capacity: int, device: torch.device, operator: PackedOperator) -> None:
        self.operator = operator
        self.numbers: dict[str, int] = {}
        self._model = model
        self._capacity = capacity
        self._device = device
        self._modules: dict[LoraLayer, Any] = {}
        self._columns: dict[LoraLayer, int] = {}
        self._experts: dict[str, dict[str, _Experts]] = {}
        self._others: dict[str, set[LoraLayer]] = {}
        self.unsupported: set[LoraLayer] = set()
        self._known: WeakKeyDictionary[Any, tuple[str, _Gates]] = WeakKeyDictionary()

    def add(self, adapter: str) -> None:
        """Adds an adapter. Its weights must stay at their addresses until [`PackedModules.remove`]."""
        number = next(number for number in range(self._capacity) if number not in self.numbers.values())
        self.numbers[adapter] = number
        others = self._others.setdefault(adapter, set())
        experts: dict[str, tuple[list[int], list[int]]] = {}
        for layer in self._model.modules():
            place = getattr(layer, "expert_places", {}).get(adapter) if isinstance(layer, LoraLayer) else None
            if place is None:
                continue
            column = self._columns.setdefault(layer, len(self._columns))
            columns, indices = experts.setdefault(place.block, ([], []))
            columns.append(column)
            indices.append(place.expert)
            if not self._set(layer, adapter, number, column):
                others.add(layer)
                self.unsupported.add(layer)
        self._experts[adapter] = {
            block: _Experts(
                *lists, (torch.tensor(lists[0], device=self._device), torch.tensor(lists[1], device=self._device))
            )
            for block, lists in experts.items()
        }

    def remove(self, adapter: str) -> None:
        """Removes an adapter. Call it before its weights are deleted."""
        number = self.numbers.pop(adapter, None)
        if number is not None:
            for module in self._modules.values():
                module.clear(number)
            del self._experts[adapter], self._others[adapter]
            self.unsupported = set[LoraLayer]().union(*self._others.values())

    def module(self, layer: LoraLayer) -> tuple[int, Any] | None:
        """A layer's column and its adapters as the kernel reads them; `None` if there are none."""
        module = self._modules.get(layer)
        return None if module is None else (self._columns[layer], module)

    def is_served(self, layer: LoraLayer, adapter: str) -> bool:
        """Whether the kernel supports an adapter in a layer."""
        return adapter in self.numbers and layer not in self._others[adapter]

    def experts(self, adapter: str, block: str) -> tuple[Tensor, Tensor]:
        """The columns of a block's modules and the indices of their experts, int64, on the device."""
        return self._experts[adapter][block].on_device

    def gates(self, route: Any) -> _Gates:
        """The gates of a request. Do not change them.

        Args:
            route: A [`milora.tuners.milora.packed.PackedRoute`].
        """
        adapter, known = self._known.get(route, (None, None))
        if known is not None and adapter == route.adapter and len(known.values) == len(self._columns):
            return known
        row = [0.0] * len(self._columns)
        experts, of_blocks = self._experts[route.adapter], route.gates
        for block in experts.keys() & of_blocks.keys():
            for column, index in zip(experts[block].columns, experts[block].indices, strict=True):
                row[column] = of_blocks[block][index]
        values = torch.tensor(row, dtype=torch.float32, device=self._device)
        if not experts.keys() <= of_blocks.keys():
            return _Gates(values, None)
        gates = _Gates(values, frozenset(column for column, gate in enumerate(row) if gate != 0))
        self._known[route] = route.adapter, gates
        return gates

    @property
    def most_rank(self) -> int:
        """The largest rank of the adapters."""
        return max((module.most_rank for module in self._modules.values()), default=0)

    def _set(self, layer: Any, adapter: str, number: int, column: int) -> bool:
        if not is_plain(layer, adapter) or layer.lora_bias.get(adapter, False):
            return False
        a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
        if a.dtype not in self.operator.dtypes:
            return False
        if layer not in self._modules:
            bias = getattr(layer.get_base_layer(), "bias", None)
            sizes = a.shape[1], b.shape[0]
            self._modules[layer] = self.operator.module(self._capacity, column, sizes, a.dtype, bias)
        factors = dora_scale(layer, adapter) if is_dora(layer, adapter) else None
        is_set: bool = self._modules[layer].set(number, a, b, layer.scaling[adapter], factors)
        return is_set


class PackedRows:
    """The tokens of a pass that the kernel adapts: one row for each request.

    Args:
        modules: The model's adapters.
        parts: First token, number of tokens and [`milora.tuners.milora.packed.PackedRoute`] of each row. The route need
            not be known yet.
    """

    def __init__(self, modules: PackedModules, parts: Sequence[tuple[int, int, Any]]) -> None:
        parts = sorted(parts, key=lambda part: modules.numbers[part[2].adapter])
        self._modules = modules
        self._routes = [route for _, _, route in parts]
        gates = [modules.gates(route) for route in self._routes]
        self._gates = torch.stack([of_row.values for of_row in gates])
        known = [of_row.chosen for of_row in gates if of_row.chosen is not None]
        self._chosen = frozenset[int]().union(*known) if len(known) == len(gates) else None
        self._lora = modules.operator.lora(
            [(first, count) for first, count, _ in parts],
            [modules.numbers[route.adapter] for route in self._routes],
            self._gates,
            modules.most_rank,
        )

    def decided(self, route: Any, block: str, decision: Decision) -> None:
        """Writes the gates of a block that a router decided. The host does not wait for the device."""
        columns, experts = self._modules.experts(route.adapter, block)
        gates = decision.gates[0].to(self._gates.device).index_select(0, experts)
        for row, each in enumerate(self._routes):
            if each is route:
                self._gates[row].index_copy_(0, columns, gates)

    def add_to(self, layer: LoraLayer, result: Tensor, x: Tensor) -> bool:
        """Adds a layer's adapters where the kernel supports them.

        Args:
            layer: The layer.
            result: (..., d_out), the base layer's output; changed in place.
            x: (..., d_in), likewise.

        Returns:
            Whether it was done.
        """
        found = self._modules.module(layer)
        if found is None:
            return False
        column, module = found
        # A module that no request chose needs no launch, which takes longer than the kernel.
        if self._chosen is not None and column not in self._chosen:
            return True
        is_added: bool = self._lora.add_to(module, result, x)
        return is_added
