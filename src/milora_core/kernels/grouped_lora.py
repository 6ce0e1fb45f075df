"""The LoRA of a batch whose rows have different adapters and routes, as one torch operator.

    result[i] += gates[i] * (x[i] A[adapters[i]]^T) B[adapters[i]]^T

A row without an adapter (index -1) and a row whose gate is 0 cost nothing: their weights are not read. This is the
grouped multiplication of Punica (Chen et al. 2023) and S-LoRA (Sheng et al. 2023), with a gate for each row.

`torch.ops.milora.add_grouped_lora` writes into its first argument. It has an implementation for CPUs, one in Triton for
all dtypes except float64, and a fake one for `torch.compile`. On a GPU it never synchronises with the host, so CUDA
graphs can capture it.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import torch
from torch import Tensor

from milora_core.errors import MiLoraError
from milora_core.kernels.grouped_lora_cpu import add_grouped_lora_on_cpu
from milora_core.kernels.triton_support import has_triton

LIBRARY = torch.library.Library("milora", "DEF")
"""Keeps the registrations below alive."""

LIBRARY.define(
    "add_grouped_lora(Tensor(a!) result, Tensor x, Tensor adapters, Tensor gates, Tensor lora_a, Tensor lora_b) -> ()"
)

NO_GRADIENT = (
    "grouped_lora is for inference and has no gradient. Run it under torch.no_grad(), or train one adapter at a time "
    "(without adapter_names), which uses PEFT's own layers."
)


def grouped_lora(
    x: Tensor, adapters: Tensor, gates: Tensor, lora_a: Tensor, lora_b: Tensor, result: Tensor | None = None
) -> Tensor:
    """`result` plus each row's gated LoRA, as a new tensor; see [`add_grouped_lora`], which writes into `result`.

    Args:
        x: (rows, tokens, d_in).
        adapters: (rows), int32 or int64.
        gates: (rows), float32.
        lora_a: (adapters, r, d_in).
        lora_b: (adapters, d_out, r).
        result: (rows, tokens, d_out); zeros of the dtype of `x` if `None`.

    Returns:
        (rows, tokens, d_out), in the dtype of `result`.
    """
    if result is None:
        result = x.new_zeros(*x.shape[:-1], lora_b.shape[1])
    else:
        result = result.clone(memory_format=torch.contiguous_format)
    return add_grouped_lora(result, x, adapters, gates, lora_a, lora_b)


def add_grouped_lora(
    result: Tensor, x: Tensor, adapters: Tensor, gates: Tensor, lora_a: Tensor, lora_b: Tensor
) -> Tensor:
    """Adds each row's LoRA to a module's output, in place: `result[i] += gates[i] * x[i] A_i^T B_i^T`.

    Args:
        result: (rows, tokens, d_out), the output of the base layer. Its dtype may differ from that of `x`.
        x: (rows, tokens, d_in), the module's input.
        adapters: (rows), int32 or int64: each row's index in the stacks, -1 for a row without an adapter. On a GPU
            out-of-range values are not detected.
        gates: (rows), float32: each row's weight, including LoRA's scaling; 0 for a row that did not choose the module.
        lora_a: (adapters, r, d_in), contiguous. Adapters of a smaller rank are padded with zeros.
        lora_b: (adapters, d_out, r), contiguous.

    Returns:
        `result`.

    Raises:
        MiLoraError: If the shapes or dtypes do not match.
        RuntimeError: If a gradient is required.
    """
    if not torch.compiler.is_compiling():
        _check(result, x, adapters, gates, lora_a, lora_b)
    torch.ops.milora.add_grouped_lora(result, x, adapters, gates, lora_a, lora_b)
    return result


def grouped_lora_reference(
    result: Tensor, x: Tensor, adapters: Tensor, gates: Tensor, lora_a: Tensor, lora_b: Tensor
) -> Tensor:
    """[`add_grouped_lora`] in plain torch, in float32 or a wider dtype, as a new tensor.

    It reads the weights of every row, including inactive ones. Devices without a kernel use it.
    """
    active = (adapters >= 0) & (gates != 0)
    index = adapters.clamp(min=0).long()
    precise = torch.promote_types(torch.float32, torch.promote_types(x.dtype, lora_a.dtype))
    low = torch.einsum("nti,nri->ntr", x.to(precise), lora_a[index].to(precise))
    delta = torch.einsum("ntr,nor->nto", low * gates.to(precise)[:, None, None], lora_b[index].to(precise))
    changed = (result.to(delta.dtype) + delta).to(result.dtype)
    return torch.where(active[:, None, None], changed, result)


def _check(result: Tensor, x: Tensor, adapters: Tensor, gates: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
    if x.dim() != 3 or result.dim() != 3 or lora_a.dim() != 3 or lora_b.dim() != 3:
        raise MiLoraError(
            "grouped_lora needs x (rows, tokens, d_in), result (rows, tokens, d_out), A (adapters, r, d_in) and B "
            f"(adapters, d_out, r); found {', '.join(str(tuple(t.shape)) for t in (x, result, lora_a, lora_b))}."
        )
    (rows, tokens, d_in), (count, r, _), d_out = x.shape, lora_a.shape, lora_b.shape[1]
    wanted = {
        "result": (result, (rows, tokens, d_out)),
        "adapters": (adapters, (rows,)),
        "gates": (gates, (rows,)),
        "A": (lora_a, (count, r, d_in)),
        "B": (lora_b, (count, d_out, r)),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise MiLoraError(
                f"grouped_lora: {name} must be {shape} for x {tuple(x.shape)}, A {tuple(lora_a.shape)} and B "
                f"{tuple(lora_b.shape)}; found {tuple(tensor.shape)}."
            )
    if adapters.dtype not in (torch.int32, torch.int64):
        raise MiLoraError(f"grouped_lora: adapters must be int32 or int64; found {adapters.dtype}.")
    if gates.dtype != torch.float32:
        raise MiLoraError(f"grouped_lora: gates must be float32; found {gates.dtype}.")
    if lora_a.dtype != lora_b.dtype:
        raise MiLoraError(f"grouped_lora: A and B must have one type; found {lora_a.dtype} and {lora_b.dtype}.")


def _on_gpu(result: Tensor, x: Tensor, adapters: Tensor, gates: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
    # The kernel accumulates in float32, which is not precise enough for float64.
    if not has_triton() or torch.float64 in (result.dtype, x.dtype, lora_a.dtype):
        _elsewhere(result, x, adapters, gates, lora_a, lora_b)
        return
    from milora_core.kernels.grouped_lora_triton import add_grouped_lora_on_gpu

    add_grouped_lora_on_gpu(result, x, adapters, gates, lora_a, lora_b)


def _elsewhere(result: Tensor, x: Tensor, adapters: Tensor, gates: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
    result.copy_(grouped_lora_reference(result, x, adapters, gates, lora_a, lora_b))


def _fake(result: Tensor, x: Tensor, adapters: Tensor, gates: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
    torch._check(x.dim() == 3 and result.dim() == 3, lambda: "grouped_lora: x and result must have three dimensions")


def _refuse_gradient(
    result: Tensor, x: Tensor, adapters: Tensor, gates: Tensor, lora_a: Tensor, lora_b: Tensor
) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in (result, x, gates, lora_a, lora_b)):
        raise RuntimeError(NO_GRADIENT)
    with torch._C._AutoDispatchBelowAutograd():
        torch.ops.milora.add_grouped_lora(result, x, adapters, gates, lora_a, lora_b)


LIBRARY.impl("add_grouped_lora", add_grouped_lora_on_cpu, "CPU")
LIBRARY.impl("add_grouped_lora", _on_gpu, "CUDA")
LIBRARY.impl("add_grouped_lora", _elsewhere, "CompositeExplicitAutograd")
LIBRARY.impl("add_grouped_lora", _refuse_gradient, "Autograd")
torch.library.register_fake("milora::add_grouped_lora", _fake, lib=LIBRARY)
