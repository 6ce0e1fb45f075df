"""`grouped_lora` on a CPU: rows of one adapter are multiplied together, inactive rows are skipped."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from milora_core.kernels.row_lora import Piece, RowLora


def add_grouped_lora_on_cpu(
    result: Tensor, x: Tensor, adapters: Tensor, gates: Tensor, lora_a: Tensor, lora_b: Tensor
) -> None:
    """See [`milora_core.kernels.grouped_lora.add_grouped_lora`].

    The result of A has the dtype of the stacks; each product accumulates in float32.

    Raises:
        IndexError: If a row's adapter is beyond the stacks.
    """
    groups = _groups(adapters, gates)
    pieces = _pieces(groups, lora_a, lora_b) if x.shape[1] == 1 else []
    if RowLora.serves(pieces) and RowLora(pieces).add_to(result, x):
        return
    x = x.to(lora_a.dtype)
    for adapter, rows, weights in groups:
        _add(result, x, rows, weights, lora_a[adapter], lora_b[adapter])


class OneToken(Protocol):
    """`grouped_lora` for one token per row, prepared for the many decode steps of a batch."""

    def add_to(self, result: Tensor, x: Tensor) -> bool:
        """Changes `result`, (rows, 1, d_out) and contiguous, in place; `x` is (rows, 1, d_in).

        Returns:
            Whether it was done; `False` if the dtypes are not supported.
        """


def one_token(adapters: Tensor, gates: Tensor, lora_a: Tensor, lora_b: Tensor) -> OneToken:
    """Prepares the decode steps of one batch; the arguments are those of `add_grouped_lora`.

    Uses the native kernel if available, else torch's matrix products.
    """
    pieces = _pieces(_groups(adapters, gates), lora_a, lora_b)
    return RowLora(pieces) if RowLora.serves(pieces) else PackedRows(adapters, gates, lora_a, lora_b)


def _pieces(groups: list[tuple[int, list[int], list[float]]], lora_a: Tensor, lora_b: Tensor) -> list[Piece]:
    return [Piece(rows, weights, 1.0, lora_a[adapter], lora_b[adapter]) for adapter, rows, weights in groups]


class PackedRows:
    """[`OneToken`] with torch's matrix products, on contiguous copies of the weights that the batch needs.

    A decode step multiplies each adapter with one token, so one call per adapter would cost more than reading its
    weights. Contiguous weights need two calls in total. They are copies of the active rows' part of the stacks, unless
    that part is contiguous already; later changes of the stacks have no effect.

    Args:
        adapters: See [`milora_core.kernels.grouped_lora.add_grouped_lora`].
        gates: Likewise.
        lora_a: Likewise.
        lora_b: Likewise.
    """

    def __init__(self, adapters: Tensor, gates: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
        groups = sorted(_groups(adapters, gates))
        # Rows of one adapter are multiplied together if all groups can be split into pieces of one size.
        self.size = math.gcd(*(len(rows) for _, rows, _ in groups))
        order = [row for _, rows, _ in groups for row in rows]
        weights = [weight for _, _, of_rows in groups for weight in of_rows]
        places = [adapter for adapter, rows, _ in groups for _ in range(len(rows) // self.size)]
        self.is_idle = not order
        if self.is_idle:
            return
        self.rows = None if order == list(range(len(adapters))) else torch.tensor(order)
        # A weight that all rows share, as with hard gates, is folded into the last product.
        self.weight = weights[0] if len(set(weights)) == 1 else 1.0
        self.weights = None if len(set(weights)) == 1 else torch.tensor(weights).view(len(places), 1, self.size)
        adjacent = places == list(range(places[0], places[0] + len(places)))
        self.a, self.b = (
            stack.narrow(0, places[0], len(places)) if adjacent else stack[places] for stack in (lora_a, lora_b)
        )

    def add_to(self, result: Tensor, x: Tensor) -> bool:
        """See [`OneToken.add_to`]; supports all dtypes."""
        if not self.is_idle:
            self._add_to(result, x)
        return True

    def _add_to(self, result: Tensor, x: Tensor) -> None:
        part = x if self.rows is None else x.index_select(0, self.rows)
        part = part.reshape(-1, self.size, x.shape[-1]).to(self.a.dtype)
        # Weights first, which reads them in memory order: (pieces, r, d_in) (pieces, d_in, size).
        low = torch.bmm(self.a, part.transpose(1, 2))
        if self.weights is not None:
            low *= self.weights.to(low.dtype)
        if self.rows is None and result.dtype == low.dtype:
            target = result.view(-1, self.size, result.shape[-1]).transpose(1, 2)
            target.baddbmm_(self.b, low, alpha=self.weight)
            return
        delta = torch.bmm(self.b, low).transpose(1, 2).reshape(-1, 1, result.shape[-1]).to(result.dtype)
        if self.rows is None:
            result.add_(delta, alpha=self.weight)
        else:
            result.index_add_(0, self.rows, delta, alpha=self.weight)


def _groups(adapters: Tensor, gates: Tensor) -> list[tuple[int, list[int], list[float]]]:
    """Each active adapter with its rows and their gates."""
    groups: dict[int, tuple[list[int], list[float]]] = {}
    for row, (adapter, gate) in enumerate(zip(adapters.tolist(), gates.tolist(), strict=True)):
        if adapter >= 0 and gate != 0:
            rows, weights = groups.setdefault(adapter, ([], []))
            rows.append(row)
            weights.append(gate)
    return [(adapter, rows, weights) for adapter, (rows, weights) in groups.items()]


def _add(result: Tensor, x: Tensor, rows: list[int], weights: list[float], a: Tensor, b: Tensor) -> None:
    first, count, tokens = rows[0], len(rows), x.shape[1]
    adjacent = rows[-1] - first + 1 == count
    # Adjacent rows (one prompt's beams, or a single row) are a view and are changed in place.
    part = x.narrow(0, first, count) if adjacent else x[rows]
    low = part.reshape(count * tokens, -1) @ a.t()
    if any(weight != weights[0] for weight in weights):
        low *= torch.tensor(weights).repeat_interleave(tokens)[:, None].to(low.dtype)
        weights = [1.0]
    target = result.narrow(0, first, count)
    if adjacent and result.is_contiguous() and result.dtype == b.dtype:
        target.view(count * tokens, -1).addmm_(low, b.t(), alpha=weights[0])
        return
    delta = (low @ b.t()).mul_(weights[0]).view(count, tokens, -1)
    if adjacent:
        target += delta
    else:
        result[rows] += delta.to(result.dtype)
