"""Modules of which PEFT keeps a full or partial copy per adapter, for rows with different adapters.

These are the modules of `modules_to_save` (for example a language model's head) and of `trainable_token_indices`.
PEFT's implementation requires that all rows' adapters and the active adapter have the module, and supports few kinds of
modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor

from milora.tuners.context import running
from milora.tuners.plan import PlannedModule


class PlannedWrapper(PlannedModule):
    """A module that PEFT copies per adapter. Each row of a pass uses its adapter's copy."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Computes each row with its adapter's copy. Uses PEFT's forward if no pass is running or if all rows use the
        active adapter."""
        context = None if torch.compiler.is_dynamo_compiling() else running(self.owner)
        wrapper: Any = self
        rows = None
        if context is not None and args and not wrapper.disable_adapters:
            if context.plan.is_packed:  # (1, tokens, ...), the tokens of many requests
                x, rows = args[0], context.plan.rows_of(args[0].shape[1])
                return forward_by_row(wrapper, rows, x.flatten(0, 1), *args[1:], **kwargs).unsqueeze(0)
            rows = context.plan.rows_of(args[0].shape[0])
        active = wrapper.active_adapters
        if rows is None or (active == list(rows) and len(rows[active[0]]) == len(args[0])):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return forward_by_row(wrapper, rows, *args, **kwargs)


def forward_by_row(
    wrapper: AuxiliaryTrainingWrapper, adapter_rows: Mapping[str, list[int]], x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """A wrapped module's output for `x`, (rows, ...). A row uses its adapter's copy; rows of adapters without one, or
    without an adapter, use the backbone's module."""
    own = {adapter: rows for adapter, rows in adapter_rows.items() if rows and adapter in wrapper._adapters}
    taken = {row for rows in own.values() for row in rows}
    others = [row for row in range(x.shape[0]) if row not in taken]
    outputs: list[Tensor] = [
        wrapper._forward_wrapped_mixed_batch(_of_rows(x, rows), adapter, *args, **kwargs)
        for adapter, rows in own.items()
    ]
    if others:
        outputs.append(wrapper.original_module(_of_rows(x, others), *args, **kwargs))
    if len(outputs) == 1:
        return outputs[0]
    order = [row for rows in (*own.values(), others) for row in rows]
    places = sorted(range(len(order)), key=order.__getitem__)
    output = torch.cat(outputs)
    return output.index_select(0, torch.tensor(places, device=output.device))


def _of_rows(x: Tensor, rows: list[int]) -> Tensor:
    return x if len(rows) == x.shape[0] else x.index_select(0, torch.tensor(rows, device=x.device))
