"""The A and B of all adapters of a model, stacked by module, as `grouped_lora` reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

IsPlain = Callable[[LoraLayer, str], bool]
"""Whether an adapter's change of a layer is `x A B` and nothing else but scaling and gates."""


class ModuleStack:
    """The adapters of one module.

    The adapters' parameters become views of the stacks, so that they are in memory once and what trains or loads them
    is seen here. Where an adapter's rank is below the largest, its B is a view with gaps.

    Attributes:
        path: The module's path in the backbone.
        layer: PEFT's layer around it.
        slots: Adapter -> its place in the stacks.
        lora_a: (capacity, r, d_in), zero where there is no adapter or its rank ends.
        lora_b: (capacity, d_out, r).
    """

    lora_a: Tensor
    lora_b: Tensor

    def __init__(self, path: str, layer: LoraLayer) -> None:
        self.path = path
        self.layer = layer
        self.slots: dict[str, int] = {}
        self._parts: dict[str, tuple[nn.Module, nn.Module]] = {}

    def fit(self, adapters: list[str], capacity: int) -> None:
        """Holds exactly these adapters from now on; nothing moves as long as they fit into the stacks there are.

        Args:
            adapters: Those that are to be stacked; all have parameters of one type on one device.
            capacity: The fewest places that stacks made anew have.
        """
        for adapter in [name for name in self.slots if name not in adapters or not self._is_current(name)]:
            del self.slots[adapter], self._parts[adapter]
        added = [name for name in adapters if name not in self.slots]
        if not added:
            return
        free = [slot for slot in range(self._places()) if slot not in self.slots.values()]
        if len(added) > len(free) or not all(self._has_room(name) for name in added):
            self._make_anew(adapters, capacity)
            added, free = adapters, list(range(len(adapters)))
        for adapter, slot in zip(added, free, strict=False):
            self._take_in(adapter, slot)

    def _places(self) -> int:
        return self.lora_a.shape[0] if hasattr(self, "lora_a") else 0

    def _weights(self, adapter: str) -> tuple[Tensor, Tensor]:
        return self.layer.lora_A[adapter].weight, self.layer.lora_B[adapter].weight

    def _is_current(self, adapter: str) -> bool:
        """Whether the adapter's parameters are still the views that were made of it."""
        layer, slot = self.layer, self.slots[adapter]
        if adapter not in layer.lora_A or (layer.lora_A[adapter], layer.lora_B[adapter]) != self._parts[adapter]:
            return False
        a, b = self._weights(adapter)
        return a.data_ptr() == self.lora_a[slot].data_ptr() and b.data_ptr() == self.lora_b[slot].data_ptr()

    def _has_room(self, adapter: str) -> bool:
        a, _ = self._weights(adapter)
        stack = self.lora_a
        return a.shape[0] <= stack.shape[1] and a.dtype == stack.dtype and a.device == stack.device

    def _make_anew(self, adapters: list[str], capacity: int) -> None:
        first_a, first_b = self._weights(adapters[0])
        rank = max(self._weights(name)[0].shape[0] for name in adapters)
        places = max(capacity, len(adapters))
        self.lora_a = first_a.detach().new_zeros(places, rank, first_a.shape[1])
        self.lora_b = first_b.detach().new_zeros(places, first_b.shape[0], rank)
        for stack in (self.lora_a, self.lora_b):
            # CUDA graphs copy what they are not told stays where it is.
            torch._dynamo.mark_static_address(stack, guard=False)
        self.slots, self._parts = {}, {}

    @torch.no_grad()
    def _take_in(self, adapter: str, slot: int) -> None:
        parameters = self._weights(adapter)
        rank = parameters[0].shape[0]
        # The parameters may be views of this very slot: those of a layer that was put in again, or a part of it.
        values = [parameter.clone() for parameter in parameters]
        self.lora_a[slot].zero_()
        self.lora_b[slot].zero_()
        places = (self.lora_a[slot, :rank], self.lora_b[slot, :, :rank])
        for parameter, value, place in zip(parameters, values, places, strict=True):
            place.copy_(value)
            parameter.data = place
        self.slots[adapter] = slot
        self._parts[adapter] = (self.layer.lora_A[adapter], self.layer.lora_B[adapter])


class AdapterStacks:
    """The stacks of all of a model's modules, made when they are first needed and again when adapters have changed.

    Left out are layers that do not run their base layer as a plain linear one (quantised backbones) and adapters that
    are more than `x A B` in a layer (DoRA, a bias); they are served by PEFT's own path.

    Args:
        model: The backbone with PEFT's layers in it.
        is_plain: Whether an adapter is `x A B` in a layer.
        capacity: How many adapters to make room for, so that one more is loaded without moving the others.
    """

    def __init__(self, model: nn.Module, is_plain: IsPlain, capacity: int = 0) -> None:
        self.model = model
        self.is_plain = is_plain
        self.capacity = capacity
        self.modules: dict[str, Any] = {}

    def refresh(self) -> None:
        """Brings the stacks up to date with the adapters that the model has now."""
        found: dict[str, ModuleStack] = {}
        for path, layer in lora_layers(self.model):
            stackable = self._stackable(layer)
            if not stackable:
                continue
            stack = self.modules.get(path)
            if stack is None or stack.layer is not layer:
                stack = self.new_module(path, layer)
            stack.fit(stackable, self.capacity)
            found[path] = stack
        self.modules = found

    def new_module(self, path: str, layer: LoraLayer) -> ModuleStack:
        """The stack of a module that has none yet."""
        return ModuleStack(path, layer)

    def bytes(self) -> int:
        """Memory of the stacks, the adapters' parameters (their views) included."""
        return sum(s.nbytes for stack in self.modules.values() for s in (stack.lora_a, stack.lora_b))

    def _stackable(self, layer: LoraLayer) -> list[str]:
        # Tuners may derive from PEFT's layer, and name it as `kind`; PEFT's own derived ones are of quantised layers.
        if getattr(layer, "kind", type(layer)) is not LoraLinear or not isinstance(
            layer.get_base_layer(), nn.Linear | Conv1D
        ):
            return []
        plain = [name for name in layer.lora_A if self.is_plain(layer, name) and not layer.lora_bias.get(name, False)]
        kinds = {name: _kind(layer.lora_A[name].weight) for name in plain}
        if not kinds:
            return []
        first = next(iter(kinds.values()))
        return [name for name in plain if kinds[name] == first and not layer.lora_A[name].weight.is_meta]


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's LoRA layers of a model by path."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer))


def _kind(weight: Tensor) -> tuple[torch.dtype, torch.device]:
    return weight.dtype, weight.device
