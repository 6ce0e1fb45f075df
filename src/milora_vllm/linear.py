"""LoRA with gates on a CPU: replacements for the `punica_wrapper` that vLLM's LoRA layers call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from milora_core.kernels import Piece, RowLora
from milora_core.kernels.row_lora import MOST_ROWS
from milora_vllm.batch import Rows, Step

Operator = Callable[[Tensor, Tensor], None]
"""Adds the LoRA output of some of a step's rows to a module's output. Arguments: (rows, d_out) and (rows, d_in)."""


class GatedLinear:
    """Replaces the punica wrapper of a linear module: multiplies each row's LoRA by the gate of its route.

        y[i] += gate[i] * (x[i] A[slot[i]]^T) B[slot[i]]^T

    Rows with gate 0 are skipped. All other methods are the wrapper's.

    Args:
        wrapped: vLLM's punica wrapper.
        layer: The block's row in a route.
        columns: The columns of the module's slices in a route, for example q, k and v of a packed projection.
        step: Returns the running step; `None` in vLLM's dummy runs, which use the wrapper.
    """

    def __init__(self, wrapped: Any, layer: int, columns: tuple[int, ...], step: Callable[[], Step | None]) -> None:
        self._wrapped = wrapped
        self._layer = layer
        self._columns = columns
        self._step = step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a: tuple[Tensor, ...],
        lora_b: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> Tensor | None:
        """See vLLM's `PunicaWrapperBase`; A is (slots, 1, r, d_in) and B is (slots, 1, d_out, r) for each slice."""
        step = self._step()
        if step is None:
            return self._wrapped.add_lora_linear(y, x, lora_a, lora_b, scale, output_slices, **kwargs)  # type: ignore[no-any-return]
        place = (self._layer, self._columns)
        operators = step.prepared.get(place)
        if operators is None:
            operators = step.prepared[place] = self._prepare(step.rows, lora_a, lora_b, scale, output_slices)
        for operator in operators:
            operator(y, x)
        return None

    def _prepare(
        self,
        rows: list[Rows],
        lora_a: tuple[Tensor, ...],
        lora_b: tuple[Tensor, ...],
        scale: float,
        sizes: tuple[int, ...],
    ) -> list[Operator]:
        operators: list[Operator] = []
        start = 0
        for column, a, b, size in zip(self._columns, lora_a, lora_b, sizes, strict=True):
            operators += self._of_slice(rows, column, a[:, 0], b[:, 0], scale, slice(start, start + size))
            start += size
        return operators

    def _of_slice(
        self, rows: list[Rows], column: int, a: Tensor, b: Tensor, scale: float, output: slice
    ) -> list[Operator]:
        """The operators of a slice: the native kernel for adapters with few rows, torch's products for many rows."""
        few: dict[int, tuple[list[int], list[float]]] = {}
        operators: list[Operator] = []
        for part in rows:
            gate = part.route.of_layer(self._layer)[column] * scale
            if gate == 0:
                continue
            of_slot, gates = few.setdefault(part.slot, ([], []))
            count = part.end - part.first
            if count + len(of_slot) > MOST_ROWS:
                operators.append(product(slice(part.first, part.end), gate, a[part.slot], b[part.slot], output))
            else:
                of_slot += range(part.first, part.end)
                gates += [gate] * count
        pieces = [Piece(of_slot, gates, 1.0, a[slot], b[slot]) for slot, (of_slot, gates) in few.items() if of_slot]
        if RowLora.serves(pieces):
            operators.append(native(RowLora(pieces), output))
        else:
            operators += [
                product(torch.tensor(piece.rows), torch.tensor(piece.gates)[:, None], piece.a, piece.b, output)
                for piece in pieces
            ]
        return operators


def native(kernel: RowLora, output: slice) -> Operator:
    """An [`Operator`] that uses the native kernel for the columns `output` of a module's output."""

    def add(y: Tensor, x: Tensor) -> None:
        target = y[:, output]
        if not kernel.add_to(target, x.contiguous()):
            raise RuntimeError(
                f"The native LoRA kernel cannot add to {tuple(target.shape)} {target.dtype} from {tuple(x.shape)} "
                f"{x.dtype}; set MILORA_NATIVE=0 to use torch."
            )

    return add


def product(rows: slice | Tensor, gates: float | Tensor, a: Tensor, b: Tensor, output: slice) -> Operator:
    """An [`Operator`] that uses torch's products for rows of one adapter.

    Args:
        rows: The rows.
        gates: One gate for all rows, or a tensor (rows, 1).
        a: (r, d_in).
        b: (d_out, r).
        output: The columns of the module's output.
    """

    def add(y: Tensor, x: Tensor) -> None:
        low = x[rows].to(a.dtype) @ a.T
        y[rows, output] += ((low * gates).to(b.dtype) @ b.T).to(y.dtype)

    return add


class IdleSkipped:
    """Replaces the punica wrapper of the embedding and the LM head: skips modules that no adapter changes.

    On a CPU, vLLM's operators read the whole vocabulary's LoRA for each row, even if all of it is zero.

    Args:
        wrapped: vLLM's punica wrapper.
        is_used: Whether a loaded adapter has weights for the module.
    """

    def __init__(self, wrapped: Any, is_used: Callable[[], bool]) -> None:
        self._wrapped = wrapped
        self._is_used = is_used

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def add_lora_embedding(self, y: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        """See vLLM's `PunicaWrapperBase`."""
        return self._wrapped.add_lora_embedding(y, *args, **kwargs) if self._is_used() else None

    def add_lora_logits(self, y: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        """See vLLM's `PunicaWrapperBase`."""
        return self._wrapped.add_lora_logits(y, *args, **kwargs) if self._is_used() else None
