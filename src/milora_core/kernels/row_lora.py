"""LoRA and DoRA for decode steps on a CPU. Each row has its own adapter and gate; weights are not copied."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from milora_core.kernels.native import library

MOST_ROWS = 32
"""Maximum number of rows per adapter. With more rows, torch's products are faster because they use matrix units."""

KERNEL_DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
"""The supported dtypes of weights, inputs and results, with their names in the C file."""


class Piece(NamedTuple):
    """The rows of a step that use one adapter in a module."""

    rows: list[int]
    gates: list[float]
    """One weight per row."""
    scaling: float
    """LoRA's scaling."""
    a: Tensor
    """(r, d_in), contiguous."""
    b: Tensor
    """(d_out, r); its rows are contiguous, with or without gaps between them."""
    factors: Tensor | None = None
    """(d_out), float32: DoRA's `m / n`; `None` for LoRA."""


class RowLora:
    """Computes `result[i] += g s B A x[i]` for the rows of a module's pieces.

    With DoRA's factors f in a piece, it computes `result[i] += g ((f - 1) (result[i] - bias) + f s B A x[i])`. The
    weights are read in place, so in-place changes take effect. The result of A stays in float32. A row belongs to at
    most one piece. Calls of one object must not run concurrently.

    Args:
        pieces: The pieces, at least one.
        bias: (d_out), the base layer's bias, which DoRA does not scale.

    Raises:
        RuntimeError: If there is no native kernel for these pieces; see [`RowLora.serves`].
    """

    def __init__(self, pieces: Sequence[Piece], bias: Tensor | None = None) -> None:
        kernels = library()
        if kernels is None or not RowLora.serves(pieces):
            raise RuntimeError("RowLora has no kernel for these pieces; ask RowLora.serves first.")
        weights = KERNEL_DTYPES[pieces[0].a.dtype]
        self._functions = {dtype: getattr(kernels, f"add_{name}_{weights}") for dtype, name in KERNEL_DTYPES.items()}
        for function in self._functions.values():
            function.argtypes, function.restype = [ctypes.c_void_p] * 3, None
        bias = None if bias is None else bias.detach().float().contiguous()
        factors = [None if piece.factors is None else piece.factors.detach().float().contiguous() for piece in pieces]
        self._tensors = [pieces, bias, factors]
        rows = [row for piece in pieces for row in piece.rows]
        self._least_rows = max(rows) + 1
        rank, self._d_in = pieces[0].a.shape
        self._d_out = pieces[0].b.shape[0]
        ends = [0]
        for piece in pieces:
            ends.append(ends[-1] + len(piece.rows))
        self._arrays: list[ctypes.Array[Any]] = [
            (ctypes.c_int64 * len(ends))(*ends),
            (ctypes.c_int64 * len(rows))(*rows),
            (ctypes.c_float * len(rows))(*[gate for piece in pieces for gate in piece.gates]),
            (ctypes.c_float * len(pieces))(*[piece.scaling for piece in pieces]),
            (ctypes.c_void_p * len(pieces))(*[piece.a.data_ptr() for piece in pieces]),
            (ctypes.c_void_p * len(pieces))(*[piece.b.data_ptr() for piece in pieces]),
            (ctypes.c_void_p * len(pieces))(*[None if f is None else f.data_ptr() for f in factors]),
        ]
        self._low = (ctypes.c_float * (len(rows) * rank))()
        self._plan = _Plan(
            *(len(pieces), rank, self._d_in, self._d_out, pieces[0].b.stride(0), torch.get_num_threads(), self._d_out),
            *(ctypes.addressof(array) for array in self._arrays),
            None if bias is None else bias.data_ptr(),
            ctypes.addressof(self._low),
        )
        self._address = ctypes.addressof(self._plan)

    @staticmethod
    def serves(pieces: Sequence[Piece]) -> bool:
        """Whether there is a kernel for these pieces on this machine."""
        if not pieces:
            return False
        first = pieces[0]
        return (
            first.a.dtype in KERNEL_DTYPES
            and all(_fits(piece, first) for piece in pieces)
            and all(len(piece.rows) <= MOST_ROWS for piece in pieces)
            and library() is not None
        )

    def add_to(self, result: Tensor, x: Tensor) -> bool:
        """Adds the LoRA of one step to `result`.

        Args:
            result: (rows, d_out), changed in place. It may have further dimensions of size 1. A two-dimensional result
                may have gaps between its rows, as a slice of a wider tensor's columns has.
            x: (rows, d_in), contiguous. It may have further dimensions of size 1.

        Returns:
            Whether it was done. If not, a tensor has unsupported gaps, is on another device, has a different or
            unsupported dtype, or its number of rows does not match.
        """
        if (
            result.dtype != x.dtype
            or x.dtype not in self._functions
            or not (x.is_cpu and result.is_cpu)
            or not (x.is_contiguous() and (result.is_contiguous() or _has_whole_rows(result)))
            or x.numel() < self._least_rows * self._d_in
            or x.numel() * self._d_out != result.numel() * self._d_in
        ):
            return False
        self._plan.y_stride = self._d_out if result.is_contiguous() else result.stride(0)
        self._functions[x.dtype](self._address, result.data_ptr(), x.data_ptr())
        return True


class _Plan(ctypes.Structure):
    """`struct plan` of the C file."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("pieces", "rank", "d_in", "d_out", "b_stride", "threads", "y_stride")),
        *((name, ctypes.c_void_p) for name in ("starts", "rows", "gates", "scalings", "a", "b", "factors", "bias")),
        ("low", ctypes.c_void_p),
    ]


def _has_whole_rows(result: Tensor) -> bool:
    return result.dim() == 2 and result.stride(1) == 1 and result.stride(0) >= result.shape[1]


def _fits(piece: Piece, first: Piece) -> bool:
    a, b = piece.a, piece.b
    return (
        a.device.type == b.device.type == "cpu"
        and a.dtype == b.dtype == first.a.dtype
        and (a.shape, b.shape) == (first.a.shape, first.b.shape)
        and a.is_contiguous()
        and b.stride(0) == first.b.stride(0)
        and (b.stride(1) == 1 or b.shape[1] == 1)
    )
