"""What replaces PEFT's loop over adapters: each adapted module adds the LoRA of all rows with one operator."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from milora.tuners.grouped.compiled_steps import OF_THE_PROCESS, CompiledSteps
from milora.tuners.grouped.stacks import AdapterStacks, ModuleStack
from milora.tuners.grouped.wrappers import forward_by_row
from milora_core.kernels import OneToken, add_grouped_lora, one_token


class Share(NamedTuple):
    """What one adapter has of a batch in one module."""

    adapter: str
    rows: list[int] | None
    """Its rows, `None` for all."""
    gates: Tensor | None
    """(its rows), float32: the module's gate for each, `None` where all are 1."""


UNKNOWN: Any = object()
"""Stands for rows that have not been looked at yet."""


@dataclass
class ModuleRows:
    """What one module does for each row of a batch: the arguments of `grouped_lora`, made once per batch.

    Attributes:
        slots: (rows), int32: each row's place in the stacks, -1 for none.
        gates: (rows), float32, LoRA's scaling in them.
        lora_a: The module's stacks.
        lora_b: Likewise.
        prepared: On a CPU, what decode steps multiply with; made at the first.
    """

    slots: Tensor
    gates: Tensor
    lora_a: Tensor
    lora_b: Tensor
    prepared: OneToken | None = None

    def add_to(self, result: Tensor, x: Tensor) -> Tensor:
        """`result` with each row's LoRA in it: (rows, tokens, d_out), (rows, d_out) or (rows * tokens, d_out)."""
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


class GroupedModule(ModuleStack):
    """A module's stacks and, while they serve, its forward.

    Attributes:
        fixed: Slots and gates at an address that stays, which a compiled decode step reads.
    """

    def __init__(self, path: str, layer: LoraLayer, serving: GroupedServing) -> None:
        super().__init__(path, layer)
        self.serving = serving
        self.fixed: tuple[Tensor, Tensor] | None = None
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """In place of the layer's own: the base layer, and the LoRA of all rows by `grouped_lora`."""
        layer: Any = self.layer
        # `is_compiling()` is also true in threads that run eagerly while another one compiles.
        if torch.compiler.is_dynamo_compiling():
            rows = self._fixed_rows()
        else:
            rows = self._rows(x)
            if rows is None:
                return self._own_forward(x, *args, **kwargs)
        if rows is None:
            return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
        kwargs.pop("adapter_names", None)
        return rows.add_to(layer.base_layer(x, *args, **kwargs), x)

    def _fixed_rows(self) -> ModuleRows | None:
        if not self.serving.is_compiled or self.fixed is None:
            return None
        return ModuleRows(*self.fixed, self.lora_a, self.lora_b)

    def _rows(self, x: Tensor) -> ModuleRows | None:
        serving, layer = self.serving, self.layer
        batch = serving.batch()
        if batch is None or torch.is_grad_enabled() or layer.disable_adapters or layer.merged:
            return None
        kept = serving.kept(batch)
        key = (self, serving.rows(batch, x))
        known: ModuleRows | None = kept.get(key, UNKNOWN)
        if known is UNKNOWN or (known is not None and known.lora_a is not self.lora_a):
            known = kept[key] = self._build(batch, x)
        return known

    def _own_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        batch = self.serving.batch()
        names = None if batch is None else self.serving.names(batch, x)
        if names is not None:
            kwargs["adapter_names"] = names
        return self.serving.own_forward(self.layer)(x, *args, **kwargs)  # type: ignore[no-any-return]

    def _build(self, batch: Any, x: Tensor) -> ModuleRows | None:
        shares = list(self.serving.shares(batch, self, x))
        served = [share for share in shares if share.adapter in self.slots]
        is_left_out = any(share.adapter in self.layer.lora_A for share in shares if share.adapter not in self.slots)
        if self.serving.is_compiled_here() and (is_left_out or not self.serving.has_fixed_rows(batch, x)):
            raise self.serving.cannot_compile(self.path)
        if is_left_out:
            return None
        rows, device = self.serving.rows(batch, x), self.lora_a.device
        slots = [-1] * rows
        gates = torch.zeros(rows, device=device)
        for share in served:
            scaling = self.layer.scaling[share.adapter]
            places = range(rows) if share.rows is None else share.rows
            for row in places:
                slots[row] = self.slots[share.adapter]
            gate = scaling if share.gates is None else share.gates.detach().to(device) * scaling
            if share.rows is None:
                gates[:] = gate
            else:
                gates[torch.tensor(share.rows, device=device)] = torch.as_tensor(gate, device=device)
        answer = ModuleRows(torch.tensor(slots, dtype=torch.int32, device=device), gates, self.lora_a, self.lora_b)
        return self._fix(answer) if self.serving.is_compiled_here() else answer

    def _fix(self, rows: ModuleRows) -> ModuleRows:
        """Writes slots and gates to where the compiled step reads them, for a batch of this size."""
        count = rows.slots.shape[0]
        if count not in self._kept or self._kept[count][0].device != rows.slots.device:
            self._kept[count] = (torch.empty_like(rows.slots), torch.empty_like(rows.gates))
            for tensor in self._kept[count]:
                torch._dynamo.mark_static_address(tensor, guard=False)
        self.fixed = self._kept[count]
        self.fixed[0].copy_(rows.slots)
        self.fixed[1].copy_(rows.gates)
        return ModuleRows(*self.fixed, rows.lora_a, rows.lora_b)


class _Stacks(AdapterStacks):
    def __init__(self, serving: GroupedServing, capacity: int) -> None:
        super().__init__(serving.model, serving.is_plain, capacity)
        self.serving = serving

    def new_module(self, path: str, layer: LoraLayer) -> GroupedModule:
        return GroupedModule(path, layer, self.serving)


class GroupedServing(CompiledSteps):
    """Serves rows with different adapters and routes through `grouped_lora`; a subclass a tuner says which rows.

    Args:
        model: The backbone with PEFT's layers in it.
        capacity: How many adapters to make room for; see [`AdapterStacks`].
    """

    def __init__(self, model: nn.Module, capacity: int = 0) -> None:
        self.model = model
        self.capacity = capacity
        self._begin()

    def _begin(self) -> None:
        self.stacks = _Stacks(self, self.capacity)
        self.begin_uncompiled()
        self._lock = threading.Lock()
        self._users = 0
        self._own_forwards: dict[nn.Module, Any] = {}

    # A copied or pickled model starts without stacks: its adapters have storage of their own.
    def __getstate__(self) -> dict[str, Any]:
        own = {"stacks", "_lock", "_users", "_own_forwards", *OF_THE_PROCESS}
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def set_capacity(self, capacity: int) -> None:
        """Changes how many adapters there is room for; stacks that have been made keep what room they have."""
        self.capacity = self.stacks.capacity = capacity

    @abstractmethod
    def batch(self) -> Any:
        """The batch that this thread is serving, or `None` where the layers' own forward is to run."""

    @abstractmethod
    def kept(self, batch: Any) -> dict[Any, Any]:
        """What is kept as long as the batch is served."""

    @abstractmethod
    def rows(self, batch: Any, x: Tensor) -> int:
        """How many rows the batch has; `x` is a module's input."""

    @abstractmethod
    def shares(self, batch: Any, module: ModuleStack, x: Tensor) -> Iterable[Share]:
        """What each adapter has of the batch in a module."""

    @abstractmethod
    def names(self, batch: Any, x: Tensor) -> list[str] | None:
        """The adapter of each row, which a layer's own forward is to be told; `None` if it knows."""

    @abstractmethod
    def adapter_rows(self, batch: Any, x: Tensor) -> Mapping[str, list[int]] | None:
        """Adapter -> its rows of a module's input `x`, `None` where one adapter serves all."""

    def has_fixed_rows(self, batch: Any, x: Tensor) -> bool:
        """Whether the next step's input will have the rows that a module's input `x` has."""
        return True

    def is_plain(self, layer: LoraLayer, adapter: str) -> bool:
        """Whether an adapter is `x A B` in a layer."""
        return adapter not in layer.lora_variant

    @contextmanager
    def serving(self) -> Iterator[None]:
        """While in force the stacks are up to date and serve what [`GroupedServing.batch`] says."""
        with self._lock:
            self.stacks.refresh()
            self._users += 1
            for module in self.stacks.modules.values():
                self._serve(module.layer, module.forward)
            if self.names_rows():
                for wrapper in self.stacks.wrappers.values():
                    self._serve(wrapper, partial(self._forward_by_row, wrapper))
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    for module, own in self._own_forwards.items():
                        module.__dict__.pop("forward", None)
                        if own is not None:
                            module.__dict__["forward"] = own
                    self._own_forwards.clear()

    def own_forward(self, module: Any) -> Callable[..., Any]:
        """The forward that a module has while nothing is served."""
        return self._own_forwards.get(module) or partial(type(module).forward, module)

    def _serve(self, module: nn.Module, forward: Any) -> None:
        # accelerate keeps the forward of a module that it watches where ours is put.
        self._own_forwards.setdefault(module, module.__dict__.get("forward"))
        module.__dict__["forward"] = forward

    def _forward_by_row(self, wrapper: AuxiliaryTrainingWrapper, *args: Any, **kwargs: Any) -> Any:
        """In place of a wrapped module's own forward: each row by its adapter's module."""
        batch = None if torch.compiler.is_dynamo_compiling() or wrapper.disable_adapters else self.batch()
        rows = None if batch is None else self.adapter_rows(batch, args[0])
        if rows is None:
            return self.own_forward(wrapper)(*args, **kwargs)
        return forward_by_row(wrapper, rows, *args, **kwargs)
