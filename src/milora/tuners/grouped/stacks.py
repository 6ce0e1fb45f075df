"""The A and B of all adapters of a model, stacked by module, as `grouped_lora` reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from milora.tuners.identity import Use
from milora_core.kernels import OneToken, add_grouped_lora, one_token


@dataclass
class ModuleRows:
    """The arguments of `grouped_lora` of one module for the rows of a batch, computed once per batch.

    Attributes:
        slots: (rows), int32: each row's index in the module's stacks of A and B, -1 for none.
        gates: (rows), float32: each row's gate times LoRA's scaling.
        prepared: The prepared decode step on a CPU; created at the first step.
    """

    slots: Tensor
    gates: Tensor
    lora_a: Tensor
    lora_b: Tensor
    prepared: OneToken | None = None

    def add_to(self, result: Tensor, x: Tensor) -> Tensor:
        """Adds each row's LoRA to `result`, (rows, tokens, d_out), (rows, d_out) or (rows * tokens, d_out)."""
        rows = self.slots.shape[0]
        if x.numel() == rows * x.shape[-1] and x.device.type == "cpu" and not torch.compiler.is_dynamo_compiling():
            if self.prepared is None:
                self.prepared = one_token(self.slots, self.gates, self.lora_a, self.lora_b)
            if self.prepared.add_to(result.view(rows, 1, -1), x.reshape(rows, 1, -1)):
                return result
        x = x.to(self.lora_a.dtype)
        changed = add_grouped_lora(
            result.view(rows, -1, result.shape[-1]),
            x.reshape(rows, -1, x.shape[-1]),
            self.slots,
            self.gates,
            self.lora_a,
            self.lora_b,
        )
        return changed.view(result.shape)


class ModuleStack:
    """The adapters of one module.

    The adapters' parameters become views of the stacks, so memory holds them once, and training and loading change the
    stacks. If an adapter's rank is below the largest, its B is a view with gaps.

    Attributes:
        slots: Adapter -> its index in the stacks.
        lora_a: (capacity, r, d_in), zero beyond an adapter's rank and in free slots.
        lora_b: (capacity, d_out, r).
        fixed: Slots and gates of a batch at fixed addresses, which a compiled decode step reads.
    """

    def __init__(self, path: str, layer: LoraLayer) -> None:
        self.path = path
        self.layer = layer
        self.slots: dict[str, int] = {}
        self.lora_a = self.lora_b = torch.empty(0, 0, 0)
        self._ranks: dict[str, int] = {}
        self._fitted_to: Any = None
        self._left: dict[int, list[Use]] = {}
        self.fixed: tuple[Tensor, Tensor] | None = None
        self._fixed_by_rows: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def fix(self, slots: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Writes a batch's slots and gates, (rows) each, to the addresses that the compiled step reads."""
        key = slots.shape[0], slots.device
        if key not in self._fixed_by_rows:
            self._fixed_by_rows[key] = (torch.empty_like(slots), torch.empty_like(gates))
            for tensor in self._fixed_by_rows[key]:
                torch._dynamo.mark_static_address(tensor, guard=False)
        self.fixed = self._fixed_by_rows[key]
        self.fixed[0].copy_(slots)
        self.fixed[1].copy_(gates)
        return self.fixed

    def fixed_rows(self) -> ModuleRows:
        """The inputs of a compiled decode step; call [`ModuleStack.fix`] first."""
        assert self.fixed is not None
        return ModuleRows(*self.fixed, self.lora_a, self.lora_b)

    def is_current(self) -> bool:
        """Whether the layer's adapters and their storage are unchanged since [`ModuleStack.fit`]."""
        return bool(self._fitted_to == _state_of(self.layer))

    def fit(self, adapters: list[str], capacity: int, running: Sequence[Use]) -> None:
        """Makes the stacks contain exactly these adapters, of one dtype and device.

        Nothing moves if they fit into the existing stacks; new ones have at least `capacity` slots. A slot is
        overwritten only when all `running` uses that read it have ended.
        """
        for adapter in [name for name in self.slots if name not in adapters or not self._is_view(name)]:
            self._left[self.slots.pop(adapter)] = [use for use in running if adapter in use.adapters]
        added = [name for name in adapters if name not in self.slots]
        read = {slot for slot, uses in self._left.items() if any(use.is_running for use in uses)}
        free = [slot for slot in range(len(self.lora_a)) if slot not in {*self.slots.values(), *read}]
        if len(added) > len(free) or not all(self._has_room(name) for name in added):
            self._make_anew(adapters, capacity)
            added, free = adapters, list(range(len(adapters)))
        for adapter, slot in zip(added, free, strict=False):
            self._take_in(adapter, slot)
        self._fitted_to = _state_of(self.layer)

    def _weights(self, adapter: str) -> tuple[Tensor, Tensor]:
        return self.layer.lora_A[adapter].weight, self.layer.lora_B[adapter].weight

    def _is_view(self, adapter: str) -> bool:
        """Whether the adapter's parameters are still views of the stacks."""
        if adapter not in self.layer.lora_A:
            return False
        a, b = self._weights(adapter)
        slot, rank = self.slots[adapter], self._ranks[adapter]
        pointers = (self.lora_a[slot].data_ptr(), self.lora_b[slot].data_ptr())
        return (a.data_ptr(), b.data_ptr()) == pointers and a.shape[0] == rank

    def _has_room(self, adapter: str) -> bool:
        a, stack = self._weights(adapter)[0], self.lora_a
        return a.shape[0] <= stack.shape[1] and a.dtype == stack.dtype and a.device == stack.device

    def _make_anew(self, adapters: list[str], capacity: int) -> None:
        first_a, first_b = self._weights(adapters[0])
        rank = max(self._weights(name)[0].shape[0] for name in adapters)
        places = max(capacity, len(adapters))
        self.lora_a = first_a.detach().new_zeros(places, rank, first_a.shape[1])
        self.lora_b = first_b.detach().new_zeros(places, first_b.shape[0], rank)
        for stack in (self.lora_a, self.lora_b):
            # CUDA graphs copy inputs whose address is not marked as static.
            torch._dynamo.mark_static_address(stack, guard=False)
        self.slots, self._left = {}, {}

    @torch.no_grad()
    def _take_in(self, adapter: str, slot: int) -> None:
        parameters = self._weights(adapter)
        rank = parameters[0].shape[0]
        # The parameters may be views of this very slot, or of a part of it, if a layer was inserted again.
        values = [parameter.clone() for parameter in parameters]
        self.lora_a[slot].zero_()
        self.lora_b[slot].zero_()
        places = (self.lora_a[slot, :rank], self.lora_b[slot, :, :rank])
        for parameter, value, place in zip(parameters, values, places, strict=True):
            place.copy_(value)
            parameter.data = place
        self.slots[adapter], self._ranks[adapter] = slot, rank


def stackable(layer: LoraLayer) -> list[str]:
    """The adapters that are `x A B` in a layer, of the first one's dtype and device; none if the layer is quantised."""
    # Our subclasses of PEFT's layers store the original class as `kind`. PEFT's own are for quantised layers.
    is_linear = getattr(layer, "kind", type(layer)) is LoraLinear
    if not is_linear or not isinstance(layer.get_base_layer(), nn.Linear | Conv1D):
        return []
    plain = [name for name in layer.lora_A if name not in layer.lora_variant and not layer.lora_bias.get(name)]
    weights = {name: layer.lora_A[name].weight for name in plain}
    kinds = {name: (weight.dtype, weight.device) for name, weight in weights.items()}
    return [name for name in plain if kinds[name] == kinds[plain[0]] and not weights[name].is_meta]


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """LoRA layers and wrapped modules by path. The adapters inside are not searched, because there may be many."""
    seen: set[nn.Module] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        is_lora = isinstance(module, LoraLayer)
        if is_lora or isinstance(module, AuxiliaryTrainingWrapper):
            yield path, module
        # Reading `_modules` is several times faster than `named_children`; this runs for every module at every pass.
        for name, child in reversed(module._modules.items()):
            if child is not None and (name == "base_layer" or not is_lora):
                waiting.append((f"{path}.{name}" if path else name, child))


def _state_of(layer: LoraLayer) -> tuple[Any, ...]:
    """The state of a layer that its stack depends on. It is compared by identity, mostly in C.

    Training and loading write to the parameters in place. The parameters are views of the stacks, so the state stays
    the same.
    """
    parts: Any = layer._modules
    lora_a, lora_b = parts["lora_A"]._modules, parts["lora_B"]._modules
    weights_a = [linear._parameters["weight"] for linear in lora_a.values()]
    return (
        parts["base_layer"],
        lora_a.copy(),
        lora_b.copy(),
        layer.lora_variant.copy(),
        layer.lora_bias.copy(),
        [weight.data_ptr() for weight in weights_a],
        [weight.shape for weight in weights_a],
        [linear._parameters["weight"].data_ptr() for linear in lora_b.values()],
    )
