"""`grouped_lora` in Triton: one kernel shrinks `x` to the rank, one expands it into the result.

A program reads its row's adapter and gate first and exits if there is nothing to do, so the weights of such a row are
never read. The shrinking sum over d_in is split into pieces, so a batch of few tokens fills the GPU. The expanding
kernel adds the pieces in a fixed order, so results are the same in every run.

Triton compiles variants of a kernel for integers that are 1 or divisible by 16. Integers that vary between prompts are
excluded, so no length or number of rows triggers a compilation while serving.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from milora_core.kernels.triton_support import is_interpreted

MAX_PIECES = 8
"""The maximum number of pieces of the sum over d_in."""


@triton.jit(do_not_specialize=["rows", "tokens", "steps"])
def _shrink(
    x, adapters, gates, lora_a, low,
    rows, tokens, d_in, rank, steps,
    x_row, x_token,
    TOKENS: tl.constexpr, RANK: tl.constexpr, IN: tl.constexpr, DOT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """low[piece, row, token, :] = x[row, token, piece of d_in] A[adapter, :, piece of d_in]^T."""
    row = tl.program_id(0)
    block = tl.program_id(1)
    piece = tl.program_id(2)
    adapter = tl.load(adapters + row).to(tl.int64)
    gate = tl.load(gates + row)
    if (adapter < 0) | (gate == 0):
        return
    token = block * TOKENS + tl.arange(0, TOKENS)
    r = tl.arange(0, RANK)
    total = tl.zeros((TOKENS, RANK), dtype=tl.float32)
    a_start = lora_a + adapter * rank * d_in
    x_start = x + row.to(tl.int64) * x_row
    for step in range(steps):
        i = (piece * steps + step) * IN + tl.arange(0, IN)
        a = tl.load(a_start + r[:, None] * d_in + i[None, :], mask=(r[:, None] < rank) & (i[None, :] < d_in), other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
        values = tl.load(
            x_start + token[:, None].to(tl.int64) * x_token + i[None, :],
            mask=(token[:, None] < tokens) & (i[None, :] < d_in),
            other=0.0,
        ).to(a.dtype)
        if DOT:
            total += tl.dot(values, tl.trans(a), input_precision="ieee")
        else:
            products = values.to(tl.float32) * a.to(tl.float32)  # one token: (1, IN) * (RANK, IN)
            total += tl.sum(products, axis=1)[None, :]
    place = ((piece * rows + row).to(tl.int64) * tokens + token[:, None]) * rank + r[None, :]
    tl.store(low + place, total, mask=(token[:, None] < tokens) & (r[None, :] < rank))


@triton.jit(do_not_specialize=["rows", "tokens"])
def _expand(
    result, low, adapters, gates, lora_b,
    rows, tokens, d_out, rank, pieces,
    result_row, result_token,
    TOKENS: tl.constexpr, RANK: tl.constexpr, OUT: tl.constexpr, DOT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """result[row, token, block of d_out] += gate * sum over pieces of low[piece, row, token, :] B[adapter]^T."""
    row = tl.program_id(0)
    block = tl.program_id(1)
    adapter = tl.load(adapters + row).to(tl.int64)
    gate = tl.load(gates + row)
    if (adapter < 0) | (gate == 0):
        return
    token = block * TOKENS + tl.arange(0, TOKENS)
    o = tl.program_id(2) * OUT + tl.arange(0, OUT)
    r = tl.arange(0, RANK)
    total = tl.zeros((TOKENS, RANK), dtype=tl.float32)
    for piece in range(pieces):
        place = ((piece * rows + row).to(tl.int64) * tokens + token[:, None]) * rank + r[None, :]
        total += tl.load(low + place, mask=(token[:, None] < tokens) & (r[None, :] < rank), other=0.0)
    total *= gate
    b_start = lora_b + adapter * d_out * rank
    b = tl.load(b_start + o[:, None] * rank + r[None, :], mask=(o[:, None] < d_out) & (r[None, :] < rank), other=0.0)
    if UPCAST:
        b = b.to(tl.float32)
    if DOT:
        delta = tl.dot(total.to(b.dtype), tl.trans(b), input_precision="ieee")
    else:
        delta = tl.sum(total * b.to(tl.float32), axis=1)[None, :]
    place = row.to(tl.int64) * result_row + token[:, None].to(tl.int64) * result_token + o[None, :]
    mask = (token[:, None] < tokens) & (o[None, :] < d_out)
    before = tl.load(result + place, mask=mask, other=0.0)
    tl.store(result + place, (before.to(tl.float32) + delta).to(before.dtype), mask=mask)


def add_grouped_lora_on_gpu(
    result: Tensor, x: Tensor, adapters: Tensor, gates: Tensor, lora_a: Tensor, lora_b: Tensor
) -> None:
    """See [`milora_core.kernels.grouped_lora.add_grouped_lora`]. No host synchronisation, so CUDA graphs can capture
    it."""
    (rows, tokens, d_in), rank, d_out = x.shape, lora_a.shape[1], lora_b.shape[1]
    if 0 in (rows, tokens, d_out, rank, d_in):
        return
    if result.stride(2) != 1:
        whole = result.contiguous()
        add_grouped_lora_on_gpu(whole, x, adapters, gates, lora_a, lora_b)
        result.copy_(whole)
        return
    x = x if x.stride(2) == 1 else x.contiguous()
    lora_a, lora_b = lora_a.contiguous(), lora_b.contiguous()
    # Tensor cores need at least 16 tokens; fewer are multiplied without them.
    use_dot = tokens > 1
    # Triton's interpreter multiplies the bits of bfloat16 as integers.
    upcast = use_dot and is_interpreted()
    block_tokens = min(64, max(16, triton.next_power_of_2(tokens))) if use_dot else 1
    block_rank = max(16, triton.next_power_of_2(rank))
    block_in = max(16, min(128, 4096 // block_rank if use_dot else 8192 // block_rank))
    block_out = max(16, min(128, 8192 // block_rank))
    steps_in_all = triton.cdiv(d_in, block_in)
    pieces = 1 if use_dot else min(MAX_PIECES, steps_in_all)
    token_blocks = triton.cdiv(tokens, block_tokens)
    low = torch.empty(pieces, rows, tokens, rank, device=x.device, dtype=torch.float32)
    # Triton launches on the current device, which may not be this module's if a model is on several devices.
    with torch.cuda.device_of(x):
        _shrink[(rows, token_blocks, pieces)](
            x, adapters, gates, lora_a, low,
            rows, tokens, d_in, rank, triton.cdiv(steps_in_all, pieces),
            x.stride(0), x.stride(1),
            TOKENS=block_tokens, RANK=block_rank, IN=block_in, DOT=use_dot, UPCAST=upcast,
        )  # fmt: skip
        _expand[(rows, token_blocks, triton.cdiv(d_out, block_out))](
            result, low, adapters, gates, lora_b,
            rows, tokens, d_out, rank, pieces,
            result.stride(0), result.stride(1),
            TOKENS=block_tokens, RANK=block_rank, OUT=block_out, DOT=use_dot, UPCAST=upcast,
        )  # fmt: skip
