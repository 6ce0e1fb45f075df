"""A router's pooling and rational activation on a CPU, in one call each instead of many torch operators."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from milora_core.kernels.native import library
from milora_core.kernels.row_lora import KERNEL_DTYPES


def pool(hidden: Tensor, mask: Tensor, weight: Tensor | None, *, normalize: bool = False) -> Tensor | None:
    """`sum_t a_t x_t` over the tokens of the mask, with `a = softmax_t(weight . x_t)`.

    `x` is `hidden`, or `hidden_t * rsqrt(mean(hidden_t^2) + 1e-6)` with `normalize`. Tokens outside the mask are not
    read: they may have any value and any position.

    Args:
        hidden: (batch, tokens, hidden).
        mask: (batch, tokens), bool, true at least once per row.
        weight: `hidden` elements, float32; `None` for the mean.
        normalize: Whether to divide each token by its root mean square first.

    Returns:
        (batch, hidden), float32. `None` if no kernel supports the call: other devices, dtypes or shapes, gaps in
        `hidden`, required gradients, tracing, or no C compiler.
    """
    weights = () if weight is None else (weight,)
    kernels = _kernels(hidden, mask, *weights)
    if (
        kernels is None
        or hidden.dtype not in KERNEL_DTYPES
        or hidden.dim() != 3
        or (mask.dtype, mask.shape) != (torch.bool, hidden.shape[:2])
        or any(of.numel() != hidden.shape[2] for of in weights)
        or any(of.dtype != torch.float32 for of in weights)
        or not hidden.is_contiguous()
    ):
        return None
    function = getattr(kernels, f"pool_{KERNEL_DTYPES[hidden.dtype]}")
    function.argtypes, function.restype = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 4, None
    batch, tokens, size = hidden.shape
    mask, weight = mask.contiguous(), None if weight is None else weight.contiguous()
    shares = torch.empty(batch, tokens, dtype=torch.float32, device="cpu")
    scales = torch.empty(batch, tokens, dtype=torch.float32, device="cpu") if normalize else None
    pooled = torch.empty(batch, size, dtype=torch.float32, device="cpu")
    function(
        hidden.data_ptr(),
        mask.data_ptr(),
        None if weight is None else weight.data_ptr(),
        shares.data_ptr(),
        None if scales is None else scales.data_ptr(),
        pooled.data_ptr(),
        batch,
        tokens,
        size,
        torch.get_num_threads(),
    )
    return pooled


def rational(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor | None:
    """`sum_j a_j x^j / (1 + |sum_i b_i x^i|)` for each element.

    Args:
        x: Any shape, float32.
        numerator: `a_0..a_m`, float32.
        denominator: `b_1..b_n`, float32.

    Returns:
        The shape of `x`, float32. `None` if no kernel supports the call; see [`pool`].
    """
    tensors = (x, numerator, denominator)
    kernels = _kernels(*tensors)
    if kernels is None or any(tensor.dtype != torch.float32 for tensor in tensors) or not x.is_contiguous():
        return None
    function = kernels.rational
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    function.argtypes, function.restype = [pointer, pointer, count, pointer, count, pointer, count], None
    result = torch.empty_like(x)
    above, below = numerator.contiguous(), denominator.contiguous()
    function(
        *(x.data_ptr(), result.data_ptr(), x.numel()),
        *(above.data_ptr(), above.numel(), below.data_ptr(), below.numel()),
    )
    return result


def _kernels(*tensors: Tensor) -> ctypes.CDLL | None:
    """The kernels, for plain CPU tensors that require no gradient."""
    # `is_compiling()` would also be true in threads that run eagerly while another thread compiles.
    if torch.compiler.is_dynamo_compiling() or (
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    ):
        return None
    if any(type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu" for tensor in tensors):
        return None
    return library()
