"""The adapters of a model as the native kernel for packed passes reads them, and the gates of its single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from milora.tuners.milora.plans.formulas import dora_scale, is_dora, is_plain
from milora_core.kernels import KERNEL_DTYPES
from milora_core.kernels.packed_lora import PackedLora, PackedModule


class PackedModules:
    """The adapters of all layers, by number.

    Args:
        model: The backbone with PEFT's layers.
        capacity: How many adapters there are at most.
    """

    def __init__(self, model: nn.Module, capacity: int) -> None:
        self._model = model
        self._capacity = capacity
        self._modules: dict[LoraLayer, PackedModule] = {}
        self._columns: dict[LoraLayer, int] = {}
        self.numbers: dict[str, int] = {}
        self._places: dict[str, list[tuple[int, str, int]]] = {}
        self._others: dict[str, set[LoraLayer]] = {}

    @property
    def columns(self) -> int:
        """How many modules there are."""
        return len(self._columns)

    def add(self, adapter: str) -> None:
        """Reads where an adapter's weights lie; they must stay there."""
        number = next(number for number in range(self._capacity) if number not in self.numbers.values())
        self.numbers[adapter] = number
        places, others = self._places.setdefault(adapter, []), self._others.setdefault(adapter, set())
        for layer in self._model.modules():
            place = getattr(layer, "expert_places", {}).get(adapter) if isinstance(layer, LoraLayer) else None
            if place is None:
                continue
            column = self._columns.setdefault(layer, len(self._columns))
            places.append((column, place.block, place.expert))
            if not self._set(layer, adapter, number, column):
                others.add(layer)

    def remove(self, adapter: str) -> None:
        """Takes an adapter out, before its weights go."""
        number = self.numbers.pop(adapter, None)
        if number is not None:
            for module in self._modules.values():
                module.clear(number)
            del self._places[adapter], self._others[adapter]

    def module(self, layer: LoraLayer) -> PackedModule | None:
        """A layer's adapters."""
        return self._modules.get(layer)

    def is_served(self, layer: LoraLayer, adapter: str) -> bool:
        """Whether the kernel serves an adapter in a layer."""
        return adapter in self.numbers and layer not in self._others[adapter]

    def has_others(self, layer: LoraLayer) -> bool:
        """Whether a layer has an adapter that the kernel does not serve."""
        return any(layer in layers for layers in self._others.values())

    def gates(self, adapter: str, gates: dict[str, list[float]]) -> list[float]:
        """The gate of each column, 0 where it is not known yet.

        Args:
            adapter: The adapter.
            gates: Block -> the gates of its experts.
        """
        row = [0.0] * len(self._columns)
        for column, block, expert in self._places[adapter]:
            if block in gates:
                row[column] = gates[block][expert]
        return row

    @property
    def most_rank(self) -> int:
        """The largest rank of the adapters."""
        return max((module.most_rank for module in self._modules.values()), default=0)

    def _set(self, layer: Any, adapter: str, number: int, column: int) -> bool:
        if not is_plain(layer, adapter) or layer.lora_bias.get(adapter, False):
            return False
        a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
        if a.dtype not in KERNEL_DTYPES:
            return False
        if layer not in self._modules:
            bias = getattr(layer.get_base_layer(), "bias", None)
            self._modules[layer] = PackedModule(self._capacity, column, (a.shape[1], b.shape[0]), a.dtype, bias)
        factors = dora_scale(layer, adapter) if is_dora(layer, adapter) else None
        return self._modules[layer].set(number, a, b, layer.scaling[adapter], factors)


class PackedRows:
    """The single adapted tokens of a pass.

    Args:
        modules: The model's adapters.
        tokens: Each one's place in the pass.
        routes: Each one's [`milora.tuners.milora.packed.PackedRoute`], known or not.
    """

    def __init__(self, modules: PackedModules, tokens: Sequence[int], routes: Sequence[Any]) -> None:
        numbers = [modules.numbers[route.adapter] for route in routes]
        order = sorted(range(len(tokens)), key=numbers.__getitem__)
        self._modules = modules
        self._routes = [routes[place] for place in order]
        self._gates: Tensor = torch.tensor([modules.gates(route.adapter, route.gates) for route in self._routes])
        self._lora = PackedLora(
            [tokens[place] for place in order], [numbers[place] for place in order], self._gates, modules.most_rank
        )

    def decided(self, route: Any) -> None:
        """Takes in the gates of a route that a router has added to."""
        for row, each in enumerate(self._routes):
            if each is route:
                self._gates[row] = torch.tensor(self._modules.gates(route.adapter, route.gates))

    def add_to(self, layer: LoraLayer, result: Tensor, x: Tensor) -> bool:
        """Adds what the kernel serves in a layer; see [`PackedLora.add_to`]."""
        module = self._modules.module(layer)
        return module is not None and self._lora.add_to(module, result, x)
