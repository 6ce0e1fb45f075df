"""The LoRA and DoRA of a packed pass: selects the device's kernel, and wraps the native kernel for a CPU.

A serving engine's batch changes at almost every step. [`milora_core.kernels.row_lora.RowLora`] prepares a call for each
module and batch. Here each adapter has a number in every module, and a batch consists of the number and the gates of
each request's tokens, for all modules at once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from milora_core.kernels.native import library
from milora_core.kernels.row_lora import KERNEL_DTYPES
from milora_core.kernels.triton_support import has_triton


class PackedOperator(NamedTuple):
    """The kernel of a device for packed passes.

    Attributes:
        module: Creates a `PackedModule` from (capacity, column, sizes, dtype, bias).
        lora: Creates a `PackedLora` from (spans of the tokens, adapters, gates, most_rank).
        dtypes: Supported dtypes of the weights.
    """

    module: Callable[..., Any]
    lora: Callable[..., Any]
    dtypes: Collection[torch.dtype]


def packed_operator(device: torch.device) -> PackedOperator | None:
    """The kernel for packed passes on a device: native on a CPU, Triton on a GPU; `None` if there is none."""
    if device.type == "cpu" and library() is not None:
        return PackedOperator(PackedModule, PackedLora, KERNEL_DTYPES)
    if device.type == "cuda" and has_triton():
        return triton_operator(device)
    return None


def triton_operator(device: torch.device) -> PackedOperator:
    """The kernel in Triton, for tensors on a GPU, or on a CPU in Triton's interpreter."""
    from milora_core.kernels import packed_lora_triton as triton

    module = partial(triton.PackedModule, device=device)
    return PackedOperator(module, triton.PackedLora, triton.KERNEL_DTYPES)


class PackedModule:
    """The adapters of one module by number. The weights are read in place.

    Args:
        capacity: The maximum number of adapters.
        column: The module's column in the gates of a pass.
        sizes: (d_in, d_out).
        dtype: The dtype of A and B, one of [`KERNEL_DTYPES`].
        bias: (d_out), the base layer's bias, which DoRA does not scale.
    """

    def __init__(
        self, capacity: int, column: int, sizes: tuple[int, int], dtype: torch.dtype, bias: Tensor | None
    ) -> None:
        self.dtype = dtype
        self.sizes = sizes
        self.most_rank = 0
        self._bias = None if bias is None else bias.detach().float().contiguous()
        self._parts = (_Part * capacity)()
        self._kept: dict[int, tuple[Tensor, ...]] = {}
        pointer = None if self._bias is None else self._bias.data_ptr()
        self.struct = _Module(ctypes.addressof(self._parts), pointer, *sizes, column)

    def set(self, number: int, a: Tensor, b: Tensor, scaling: float, factors: Tensor | None = None) -> bool:
        """Gives a number to an adapter.

        Args:
            number: The number.
            a: (r, d_in), contiguous.
            b: (d_out, r); its rows are contiguous, with or without gaps between them.
            scaling: LoRA's factor.
            factors: (d_out): DoRA's `m / n`; `None` for LoRA.

        Returns:
            Whether the adapter was added. Weights of another dtype, shape, device or layout are not supported.
        """
        is_right = (
            a.dtype == b.dtype == self.dtype
            and a.device.type == b.device.type == "cpu"
            and (a.shape[1], b.shape[0]) == self.sizes
            and a.is_contiguous()
            and (b.stride(1) == 1 or b.shape[1] == 1)
        )
        if not is_right:
            return False
        kept = (a, b) if factors is None else (a, b, factors.detach().float().contiguous())
        self._kept[number] = kept
        pointers = [tensor.data_ptr() for tensor in kept] + [None] * (3 - len(kept))
        self._parts[number] = _Part(*pointers, a.shape[0], b.stride(0), scaling)
        self.most_rank = max(self.most_rank, a.shape[0])
        return True

    def clear(self, number: int) -> None:
        """Removes an adapter."""
        self._parts[number] = _Part()
        self._kept.pop(number, None)


class PackedLora:
    """The adapted tokens of one pass.

    Args:
        spans: First token and number of tokens of each row: a single token, or adjacent tokens of one request. No two
            spans overlap.
        adapters: The adapter's number of each row. Rows with the same adapter must be adjacent.
        gates: (rows, columns), float32, contiguous: each row's gate in each module, 0 where the module was not chosen.
            It may change between calls.
        most_rank: The largest rank of the adapters.

    Raises:
        RuntimeError: If there is no native kernel.
    """

    def __init__(
        self, spans: Sequence[tuple[int, int]], adapters: Sequence[int], gates: Tensor, most_rank: int
    ) -> None:
        kernels = library()
        if kernels is None:
            raise RuntimeError("There is no native kernel on this machine.")
        firsts, counts = zip(*spans, strict=True)
        rows = sum(counts)
        self._functions: dict[Any, Any] = {}
        for x, of_x in KERNEL_DTYPES.items():
            for weights, of_weights in KERNEL_DTYPES.items():
                function = getattr(kernels, f"add_packed_{of_x}_{of_weights}")
                function.argtypes, function.restype = [ctypes.c_void_p] * 4, None
                self._functions[x, weights] = function
        self._least_tokens = max(first + count for first, count in spans)
        self._gates = gates
        self._arrays: list[Any] = [
            (ctypes.c_int64 * len(spans))(*firsts),
            (ctypes.c_int64 * len(spans))(*counts),
            (ctypes.c_int64 * len(spans))(*adapters),
            (ctypes.c_int64 * rows)(),
            (ctypes.c_int64 * (rows + 1))(),
            (ctypes.c_float * rows)(),
            (ctypes.c_float * rows)(),
            (ctypes.c_void_p * (3 * rows))(),
            (ctypes.c_float * (rows * max(most_rank, 1)))(),
        ]
        addresses = [ctypes.addressof(array) for array in self._arrays]
        self._struct = _Packed(
            *(len(spans), torch.get_num_threads(), *addresses[:3]),
            *(gates.data_ptr(), gates.stride(0), rows, *addresses[3:]),
        )
        self._address = ctypes.addressof(self._struct)

    def add_to(self, module: PackedModule, result: Tensor, x: Tensor) -> bool:
        """Adds the adapters of a module to its output, in place.

        Args:
            module: The module.
            result: (..., d_out), the pass's tokens; changed in place.
            x: (..., d_in), likewise.

        Returns:
            Whether it was done. Tensors with gaps, of other dtypes or on another device are not supported.
        """
        function = self._functions.get((x.dtype, module.dtype))
        d_in, d_out = module.sizes
        if (
            function is None
            or result.dtype != x.dtype
            or not (x.is_cpu and x.is_contiguous() and result.is_contiguous())
            or x.numel() < self._least_tokens * d_in
            or x.numel() * d_out != result.numel() * d_in
        ):
            return False
        function(self._address, ctypes.addressof(module.struct), result.data_ptr(), x.data_ptr())
        return True


class _Part(ctypes.Structure):
    """`struct part` of the C file."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b", "factors")),
        *((name, ctypes.c_int64) for name in ("rank", "b_stride")),
        ("scaling", ctypes.c_float),
    ]


class _Module(ctypes.Structure):
    """`struct module` of the C file."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("parts", "bias")),
        *((name, ctypes.c_int64) for name in ("d_in", "d_out", "column")),
    ]


class _Packed(ctypes.Structure):
    """`struct packed` of the C file."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("spans", "threads")),
        *((name, ctypes.c_void_p) for name in ("firsts", "counts", "adapters", "gates")),
        *((name, ctypes.c_int64) for name in ("gates_stride", "rows")),
        *((name, ctypes.c_void_p) for name in ("entries", "starts", "weights", "scalings", "pointers", "low")),
    ]
