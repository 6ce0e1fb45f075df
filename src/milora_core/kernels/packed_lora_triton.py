"""The LoRA and DoRA of a packed pass in Triton: single tokens and prompt chunks of many adapters, two launches each.

A packed pass is one row with the tokens of many requests. Its adapted tokens are cut into blocks: a block holds a
single token, or up to [`SPAN_TOKENS`] adjacent tokens of one request, so it has one adapter. For each block

    d = A x                                                        (tokens, r)
    y = y + g s B d                                                LoRA
    y = y + g ((f - 1) (y - bias) + f s B d)                       DoRA, with factors f = m / n of each output feature

Weights are read in place, by the addresses in a table of each module, so nothing is stacked or copied when the batch
changes. A block whose gate is 0, or whose adapter does not adapt the module, exits before it reads weights. The
shrinking sum over d_in is split into pieces, so a few tokens fill the GPU. The expanding kernel adds the pieces in a
fixed order, so results are the same in every run. Sums are in float32. The host never waits for the GPU.

This is the multiplication of Punica (Chen et al. 2023) and S-LoRA (Sheng et al. 2023) with a gate for each request and
module.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from milora_core.kernels.triton_support import is_interpreted

KERNEL_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
"""Supported dtypes of weights, inputs and results."""

SPAN_TOKENS = 32
"""Tokens of a block of a prompt chunk. Tensor cores need at least 16. Larger blocks leave a GPU idle at the engine's
default step of 512 tokens."""

MAX_PIECES = 8
"""The maximum number of pieces of the sum over d_in."""

ALIGNMENT = 16
"""Bytes to which weights are aligned: the widest load of a thread."""

FIELDS = 5
"""Columns of a module's table: addresses of A, B and the DoRA factors, rank, stride of B."""


@triton.jit(do_not_specialize=["steps", "column", "columns", "blocks_in_all"])
def _shrink(
    x, blocks, gates, table, low,
    d_in, steps, column, columns, blocks_in_all,
    TOKENS: tl.constexpr, RANK: tl.constexpr, IN: tl.constexpr,
    WEIGHT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """low[piece, block] = x[tokens of the block, piece of d_in] A[adapter, :, piece of d_in]^T."""
    block = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    first = tl.load(blocks + block * 4).to(tl.int64)
    count = tl.load(blocks + block * 4 + 1)
    gate = tl.load(gates + tl.load(blocks + block * 4 + 2).to(tl.int64) * columns + column)
    part = table + tl.load(blocks + block * 4 + 3).to(tl.int64) * 5
    address = tl.load(part)
    if (gate == 0) | (address == 0):
        return
    rank = tl.load(part + 3)
    a = tl.multiple_of(address.to(tl.pointer_type(WEIGHT)), 16)
    token = tl.arange(0, TOKENS)
    r = tl.arange(0, RANK)
    total = tl.zeros((TOKENS, RANK), dtype=tl.float32)
    for step in range(steps):
        i = (piece * steps + step) * IN + tl.arange(0, IN)
        weights = tl.load(a + r[:, None] * d_in + i[None, :], mask=(r[:, None] < rank) & (i[None, :] < d_in), other=0.0)
        values = tl.load(
            x + (first + token[:, None]) * d_in + i[None, :],
            mask=(token[:, None] < count) & (i[None, :] < d_in),
            other=0.0,
        )
        if TOKENS == 1:  # (1, IN) * (RANK, IN)
            total += tl.sum(values.to(tl.float32) * weights.to(tl.float32), axis=1)[None, :]
        else:
            total += tl.dot(values.to(COMPUTE), tl.trans(weights.to(COMPUTE)), input_precision=PRECISION)
    place = ((piece * blocks_in_all + block) * TOKENS + token[:, None]) * RANK + r[None, :]
    tl.store(low + place, total)


@triton.jit(do_not_specialize=["pieces", "column", "columns", "blocks_in_all"])
def _expand(
    result, blocks, gates, table, scalings, bias, low,
    d_out, pieces, column, columns, blocks_in_all,
    TOKENS: tl.constexpr, RANK: tl.constexpr, OUT: tl.constexpr,
    WEIGHT: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DORA: tl.constexpr,
):  # fmt: skip
    """Changes result[tokens of the block, block of d_out] by the sum over pieces of low[piece, block]."""
    block = tl.program_id(0).to(tl.int64)
    first = tl.load(blocks + block * 4).to(tl.int64)
    count = tl.load(blocks + block * 4 + 1)
    number = tl.load(blocks + block * 4 + 3).to(tl.int64)
    gate = tl.load(gates + tl.load(blocks + block * 4 + 2).to(tl.int64) * columns + column)
    part = table + number * 5
    if (gate == 0) | (tl.load(part) == 0):
        return
    b = tl.multiple_of(tl.load(part + 1).to(tl.pointer_type(WEIGHT)), 16)
    rank = tl.load(part + 3)
    b_stride = tl.load(part + 4)
    if ALIGNED:  # So that a thread loads several elements of a row of B at once.
        rank = tl.multiple_of(rank, 8)
        b_stride = tl.multiple_of(b_stride, 8)
    token = tl.arange(0, TOKENS)
    o = tl.program_id(1) * OUT + tl.arange(0, OUT)
    r = tl.arange(0, RANK)
    total = tl.zeros((TOKENS, RANK), dtype=tl.float32)
    for piece in range(pieces):
        total += tl.load(low + ((piece * blocks_in_all + block) * TOKENS + token[:, None]) * RANK + r[None, :])
    weights = tl.load(
        b + o[:, None] * b_stride + r[None, :], mask=(o[:, None] < d_out) & (r[None, :] < rank), other=0.0
    ).to(tl.float32)
    if TOKENS == 1:
        change = tl.sum(total * weights, axis=1)[None, :]
    else:
        change = tl.dot(total, tl.trans(weights), input_precision=PRECISION)
    change *= tl.load(scalings + number)
    mask = (token[:, None] < count) & (o[None, :] < d_out)
    place = result + (first + token[:, None]) * d_out + o[None, :]
    before = tl.load(place, mask=mask, other=0.0)
    y = before.to(tl.float32)
    if HAS_DORA:
        address = tl.load(part + 2)
        is_dora = (o < d_out) & (address != 0)
        factors = tl.load(address.to(tl.pointer_type(tl.float32)) + o, mask=is_dora, other=1.0)[None, :]
        bare = y
        if HAS_BIAS:
            bare -= tl.load(bias + o, mask=is_dora, other=0.0)[None, :]
        change = factors * change + tl.where(is_dora[None, :], (factors - 1) * bare, 0.0)
    tl.store(place, (y + gate * change).to(before.dtype), mask=mask)


class PackedModule:
    """The adapters of one module by number, for [`PackedLora`]. The weights are read in place.

    Args:
        capacity: The maximum number of adapters.
        column: The module's column in the gates of a pass.
        sizes: (d_in, d_out).
        dtype: The dtype of A and B, one of [`KERNEL_DTYPES`].
        bias: (d_out), the base layer's bias, which DoRA does not scale.
        device: The device of the weights.
    """

    def __init__(
        self,
        capacity: int,
        column: int,
        sizes: tuple[int, int],
        dtype: torch.dtype,
        bias: Tensor | None,
        device: torch.device,
    ) -> None:
        self.column, self.sizes, self.dtype = column, sizes, dtype
        self.table = torch.zeros(capacity, FIELDS, dtype=torch.int64, device=device)
        self.scalings = torch.zeros(capacity, dtype=torch.float32, device=device)
        self.bias = None if bias is None else bias.detach().to(device, torch.float32).contiguous()
        self.most_rank = 0
        self.is_aligned = True
        self.has_dora = False
        self._kept: dict[int, tuple[Tensor, ...]] = {}

    def set(self, number: int, a: Tensor, b: Tensor, scaling: float, factors: Tensor | None = None) -> bool:
        """Gives a number to an adapter.

        Args:
            number: The number.
            a: (r, d_in), contiguous.
            b: (d_out, r); its rows are contiguous, with or without gaps between them.
            scaling: LoRA's factor `s`.
            factors: (d_out): DoRA's `m / n`; `None` for LoRA.

        Returns:
            Whether the adapter was added. Weights of another dtype, shape, device or layout are not supported.
        """
        is_right = (
            a.dtype == b.dtype == self.dtype
            and a.device == b.device == self.table.device
            and (a.shape[1], b.shape[0]) == self.sizes
            and a.is_contiguous()
            and (b.stride(1) == 1 or b.shape[1] == 1)
            and a.data_ptr() % ALIGNMENT == b.data_ptr() % ALIGNMENT == 0
        )
        if not is_right:
            return False
        kept = (a, b) if factors is None else (a, b, factors.detach().to(self.table.device, torch.float32).contiguous())
        addresses = [tensor.data_ptr() for tensor in kept] + [0] * (3 - len(kept))
        self.table[number] = torch.tensor([*addresses, a.shape[0], b.stride(0)])
        self.scalings[number] = scaling
        self._kept[number] = kept
        self.most_rank = max(self.most_rank, a.shape[0])
        # They choose variants of the kernel and never go back, so few variants are compiled.
        self.is_aligned = self.is_aligned and a.shape[0] % 8 == b.stride(0) % 8 == 0
        self.has_dora = self.has_dora or factors is not None
        return True

    def clear(self, number: int) -> None:
        """Removes an adapter."""
        self.table[number] = 0
        self._kept.pop(number, None)


class PackedLora:
    """The adapted tokens of one pass.

    Args:
        spans: First token and number of tokens of each row: a single token, or adjacent tokens of one request. No two
            spans overlap.
        adapters: The adapter's number of each row.
        gates: (rows, columns), float32, contiguous, on the device: each row's gate in each module, 0 where the module
            was not chosen. It may change between calls.
        most_rank: The largest rank of the adapters.
    """

    def __init__(
        self, spans: Sequence[tuple[int, int]], adapters: Sequence[int], gates: Tensor, most_rank: int
    ) -> None:
        self._gates = gates
        self._rank = max(16, triton.next_power_of_2(most_rank))
        self._tokens = max(first + count for first, count in spans)
        rows = list(zip(spans, adapters, strict=True))
        singles = [(first, 1, row, number) for row, ((first, count), number) in enumerate(rows) if count == 1]
        chunks = [
            (first + start, min(SPAN_TOKENS, count - start), row, number)
            for row, ((first, count), number) in enumerate(rows)
            if count > 1
            for start in range(0, count, SPAN_TOKENS)
        ]
        # Four int32 are 16 bytes, so both parts are aligned alike and share a variant of the kernels.
        blocks = torch.tensor(singles + chunks, dtype=torch.int32).to(gates.device)
        parts = ((blocks[: len(singles)], 1), (blocks[len(singles) :], SPAN_TOKENS))
        self._parts = [(of_part, tokens) for of_part, tokens in parts if len(of_part)]
        most = max(len(of_part) * tokens for of_part, tokens in self._parts)
        self._low = torch.empty(MAX_PIECES * most * self._rank, dtype=torch.float32, device=gates.device)

    def add_to(self, module: PackedModule, result: Tensor, x: Tensor) -> bool:
        """See [`milora_core.kernels.packed_lora.PackedLora.add_to`]."""
        d_in, d_out = module.sizes
        if (
            x.dtype not in KERNEL_DTYPES
            or result.dtype not in KERNEL_DTYPES
            or not x.device == result.device == self._gates.device == module.table.device
            or not (x.is_contiguous() and result.is_contiguous())
            or x.numel() < self._tokens * d_in
            or x.numel() * d_out != result.numel() * d_in
        ):
            return False
        # Half-precision inputs fit TF32 exactly; it rounds float32 weights less than the result is rounded.
        precision = "ieee" if torch.float32 in (x.dtype, result.dtype) else "tf32"
        # Triton's interpreter multiplies the bits of bfloat16 as integers.
        is_half = x.dtype == module.dtype != torch.float32 and not is_interpreted()
        with torch.cuda.device_of(x):
            for blocks, tokens in self._parts:
                rank, count = self._rank, len(blocks)
                size = max(16, min(128, (8192 if tokens == 1 else 4096) // rank))
                out = max(16, min(128, 8192 // rank))
                steps = triton.cdiv(d_in, size)
                pieces = min(MAX_PIECES, steps)
                _shrink[(count, pieces)](
                    x, blocks, self._gates, module.table, self._low,
                    d_in, triton.cdiv(steps, pieces), module.column, self._gates.shape[1], count,
                    TOKENS=tokens, RANK=rank, IN=size, WEIGHT=KERNEL_DTYPES[module.dtype],
                    COMPUTE=KERNEL_DTYPES[module.dtype] if is_half else tl.float32, PRECISION=precision,
                )  # fmt: skip
                _expand[(count, triton.cdiv(d_out, out))](
                    result, blocks, self._gates, module.table, module.scalings, module.bias, self._low,
                    d_out, pieces, module.column, self._gates.shape[1], count,
                    TOKENS=tokens, RANK=rank, OUT=out, WEIGHT=KERNEL_DTYPES[module.dtype], PRECISION=precision,
                    ALIGNED=module.is_aligned, HAS_BIAS=module.bias is not None, HAS_DORA=module.has_dora,
                )  # fmt: skip
        return True
