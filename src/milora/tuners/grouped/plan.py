"""The plan of a batch whose rows have different adapters: the LoRA of all rows in one operator per module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from milora.tuners.grouped.owner import GroupedOwner
from milora.tuners.grouped.stacks import ModuleRows
from milora.tuners.identity import BASE_ROW
from milora.tuners.plan import Plan
from milora_core.errors import MiLoraError, did_you_mean


class Share(NamedTuple):
    """One adapter's share of a batch in one module."""

    adapter: str
    rows: list[int] | None
    """The adapter's rows; `None` for all."""
    gates: Tensor | None
    """(number of its rows), float32: the module's gate for each row; `None` if all are 1."""


@dataclass(eq=False)
class GroupedPlan:
    """See [`milora.tuners.plan.Plan`].

    Attributes:
        owner: The model's owner of contexts.
        shares: Gives each adapter's share of the batch, from a layer and the number of rows.
        otherwise: The plan of layers that the operator does not support.
        kept: Data by module, kept for the batch.
        rows: The number of rows of the batch. With `None` it is the first dimension of a module's input, which does
            not stay the same where batch and tokens are flattened.
        is_compiled: Whether to write the rows to the addresses that a compiled step reads.
    """

    is_packed = False

    owner: GroupedOwner
    shares: Callable[[Any, int], Iterable[Share]]
    otherwise: Plan
    kept: dict[Any, Any]
    rows: int | None
    is_compiled: bool

    def rows_of(self, rows: int) -> dict[str, list[int]] | None:
        """See [`milora.tuners.plan.Plan.rows_of`]."""
        return self.otherwise.rows_of(rows)

    def forward(self, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See [`milora.tuners.plan.Plan.forward`]."""
        rows = self._rows(layer, x)
        if rows is None:
            return self.otherwise.forward(layer, x, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        return rows.add_to(layer.base_layer(x, *args, **kwargs), x)

    def _rows(self, layer: Any, x: Tensor) -> ModuleRows | None:
        stack = layer.stack
        if stack is None or torch.is_grad_enabled() or layer.disable_adapters or layer.merged:
            return None
        count = x.shape[0] if self.rows is None else self.rows
        key = (layer, count)
        known: ModuleRows | None = self.kept.get(key)
        if known is None or known.lora_a is not stack.lora_a:
            if key in self.kept and known is None:
                return None  # Checked before: the operator does not support it.
            with self.owner.identities.lock:  # Slots and stacks must be consistent.
                known = self.kept[key] = self._build(layer, count, is_fixed=self.rows is not None or x.dim() > 2)
        return known

    def _build(self, layer: Any, rows: int, *, is_fixed: bool) -> ModuleRows | None:
        stack, device = layer.stack, layer.stack.lora_a.device
        shares = [share for share in self.shares(layer, rows) if share.adapter in layer.lora_A]
        is_left_out = any(share.adapter not in stack.slots for share in shares)
        if self.is_compiled and (is_left_out or not is_fixed):
            raise self.owner.cannot_compile(stack.path)
        if is_left_out:
            return None
        of_rows = [-1] * rows
        gates = torch.zeros(rows, device=device)
        for share in shares:
            for row in range(rows) if share.rows is None else share.rows:
                of_rows[row] = stack.slots[share.adapter]
            own = slice(None) if share.rows is None else torch.tensor(share.rows, dtype=torch.long, device=device)
            scaling = layer.scaling[share.adapter]
            gates[own] = scaling if share.gates is None else share.gates.detach().to(device) * scaling
        slots = torch.tensor(of_rows, dtype=torch.int32, device=device)
        if self.is_compiled:
            slots, gates = stack.fix(slots, gates)
        return ModuleRows(slots, gates, stack.lora_a, stack.lora_b)


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


def checked_names(names: Sequence[str], known: Iterable[str], *, training: bool) -> tuple[str, ...]:
    """The adapters that a caller names for the rows.

    Raises:
        MiLoraError: If there is none or one that is not `known`, or the model is in training mode.
    """
    if training:
        raise MiLoraError("adapter_names is for inference; call model.eval() first.")
    if not names:
        raise MiLoraError("adapter_names is empty; it names an adapter for each row.")
    known = sorted(known)
    for name in names:
        if name != BASE_ROW and name not in known:
            raise MiLoraError(f"No adapter named {name!r}; there are {known}{did_you_mean(name, known) or '.'}")
    return tuple(names)
