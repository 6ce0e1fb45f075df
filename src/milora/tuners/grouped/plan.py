"""The plan of a batch whose rows have different adapters: the LoRA of all rows in one operator per module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from milora.tuners.grouped.owner import GroupedOwner
from milora.tuners.grouped.stacks import ModuleRows
from milora.tuners.identity import BASE_ROW
from milora_core.errors import MiLoraError


class Share(NamedTuple):
    """One adapter's share of a batch in one module."""

    adapter: str
    rows: list[int] | None
    """The adapter's rows; `None` for all."""
    gates: Tensor | None
    """(number of its rows), float32: the module's gate for each row; `None` if all are 1."""


class GroupedPlan(ABC):
    """See [`milora.tuners.plan.Plan`]. A subclass defines the adapters of the rows, and the fallback for layers without
    a stack.

    `kept` is data by module, kept for the batch. With `is_compiled`, the rows are written to the addresses that a
    compiled step reads.
    """

    is_packed = False

    def __init__(self, owner: GroupedOwner, kept: dict[Any, Any], *, is_compiled: bool) -> None:
        self.owner = owner
        self.kept = kept
        self.is_compiled = is_compiled

    @abstractmethod
    def batch_rows(self, x: Tensor) -> int:
        """The number of rows of the batch; `x` is a module's input."""

    @abstractmethod
    def shares(self, layer: Any, x: Tensor) -> Iterable[Share]:
        """Each adapter's share of the batch in a layer."""

    @abstractmethod
    def otherwise(self, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of a layer that the operator does not support."""

    def has_fixed_rows(self, x: Tensor) -> bool:
        """Whether the next step's input will have the same rows as a module's input `x`."""
        return True

    def forward(self, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See [`milora.tuners.plan.Plan.forward`]."""
        rows = self._rows(layer, x)
        if rows is None:
            return self.otherwise(layer, x, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        return rows.add_to(layer.base_layer(x, *args, **kwargs), x)

    def _rows(self, layer: Any, x: Tensor) -> ModuleRows | None:
        stack = layer.stack
        if stack is None or torch.is_grad_enabled() or layer.disable_adapters or layer.merged:
            return None
        key = (layer, self.batch_rows(x))
        known: ModuleRows | None = self.kept.get(key)
        if known is None or known.lora_a is not stack.lora_a:
            if key in self.kept and known is None:
                return None  # Checked before: the operator does not support it.
            with self.owner.identities.lock:  # Slots and stacks must be consistent.
                known = self.kept[key] = self._build(layer, x)
        return known

    def _build(self, layer: Any, x: Tensor) -> ModuleRows | None:
        stack = layer.stack
        shares = [share for share in self.shares(layer, x) if share.adapter in layer.lora_A]
        is_left_out = any(share.adapter not in stack.slots for share in shares)
        if self.is_compiled and (is_left_out or not self.has_fixed_rows(x)):
            raise self.owner.cannot_compile(stack.path)
        if is_left_out:
            return None
        rows, device = self.batch_rows(x), stack.lora_a.device
        slots = [-1] * rows
        gates = torch.zeros(rows, device=device)
        for share in shares:
            scaling = layer.scaling[share.adapter]
            for row in range(rows) if share.rows is None else share.rows:
                slots[row] = stack.slots[share.adapter]
            gate = scaling if share.gates is None else share.gates.detach().to(device) * scaling
            if share.rows is None:
                gates[:] = gate
            else:
                gates[torch.tensor(share.rows, device=device)] = torch.as_tensor(gate, device=device)
        slots_of_rows = torch.tensor(slots, dtype=torch.int32, device=device)
        if self.is_compiled:
            slots_of_rows, gates = stack.fix(slots_of_rows, gates)
        return ModuleRows(slots_of_rows, gates, stack.lora_a, stack.lora_b)


def rows_by_adapter(names: tuple[str, ...], rows: int) -> dict[str, list[int]]:
    """Adapter -> its rows in a batch of `rows` rows, a multiple of the names: a prompt's beams are consecutive rows."""
    by_adapter: dict[str, list[int]] = {}
    for row, name in enumerate(names_of_rows(names, rows)):
        if name != BASE_ROW:
            by_adapter.setdefault(name, []).append(row)
    return by_adapter


def names_of_rows(names: tuple[str, ...], rows: int) -> list[str]:
    """The adapter of each row; see [`rows_by_adapter`]."""
    return [name for name in names for _ in range(rows // len(names))]


def check_names(names: tuple[str, ...], rows: int, prompts: int | None) -> None:
    """Raises a [`MiLoraError`] unless there is a name for each prompt of `generate`, or outside a generation (`prompts`
    is `None`) for each of the pass's `rows`."""
    if len(names) != (rows if prompts is None else prompts) or rows % len(names) != 0:
        found = f"the batch has {rows}" if prompts is None else f"generate was given {prompts} prompts"
        raise MiLoraError(f"adapter_names names {len(names)} rows; {found}. Give one name for each.")
