"""The formulas of an expert: LoRA's gated sum with its gradients, and DoRA's."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

ROWS_AT_ONCE = 1024
"""Weight rows adapted at a time: all of them would be a second copy of the weight in the adapter's precision."""


def is_plain(layer: LoraLayer, adapter: str) -> bool:
    """Whether `lora_A` and `lora_B` are plain matrices, which may be used without calling their modules.

    They are not if their modules have hooks or keep their weights elsewhere between calls (FSDP, DeepSpeed,
    accelerate's offloading, which replaces their forward), or with `lora_bias`.
    """
    modules: tuple[Any, ...] = (layer.lora_A[adapter], layer.lora_B[adapter])
    return all(
        type(module) is nn.Linear
        and getattr(module, "bias", None) is None
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and "forward" not in module.__dict__
        for module in modules
    )


def is_dora(layer: LoraLayer, adapter: str) -> bool:
    """Whether an adapter is DoRA in a layer."""
    return adapter in layer.lora_variant


def add_expert(
    layer: Any, adapter: str, x: Tensor, result: Tensor, index: Tensor | None, gate: Tensor | None, scale: Any
) -> Tensor:
    """`y + g (expert(x) - y)` at some places of the first dimension, `y` being the base layer's output elsewhere.

    LoRA: `expert(x) = y + s B A x`. DoRA (Liu et al. 2024, equation 5): `f (W + s B A) x + b`, `f = m / |W + s B A|`.

    Args:
        layer: PEFT's LoRA layer.
        adapter: The adapter.
        x: (places, ..., d_in).
        result: (places, ..., d_out): `y`. Without gradients it may be written into.
        index: The indices that chose the expert, `None` for all.
        gate: (chosen places), float32: `g`; `None` for ones without a gradient.
        scale: Gives DoRA's `f`, (d_out), in inference.
    """
    gate = None if gate is None else gate.to(x.device)
    is_lora, dropout = not is_dora(layer, adapter), layer.lora_dropout[adapter]
    has_dropout = layer.training and not isinstance(dropout, nn.Identity)
    if is_lora and not has_dropout and not torch.is_autocast_enabled(x.device.type) and is_plain(layer, adapter):
        a, b, scaling = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]
        return expert_sum(x, result, a, b, gate, index, scaling)
    if index is None:
        return _general(layer, adapter, x, result, gate, scale)
    part = _general(layer, adapter, x.index_select(0, index), result.index_select(0, index), gate, scale)
    # Rounded like the layer's output, so a row's result does not depend on the routes of other rows.
    return result.index_copy(0, index, part.to(result.dtype))


def _general(layer: Any, adapter: str, x: Tensor, result: Tensor, gate: Tensor | None, scale: Any) -> Tensor:
    """For rows that all chose the expert, for any kind of expert."""
    lora_a, lora_b = layer.lora_A[adapter], layer.lora_B[adapter]
    x = layer._cast_input_dtype(x, lora_a.weight.dtype)
    if is_dora(layer, adapter):
        if torch.is_grad_enabled() or not is_plain(layer, adapter):
            adapted: Tensor = layer.lora_variant[adapter].forward(layer, active_adapter=adapter, x=x, result=result)
        else:
            adapted = _dora(layer, adapter, x, result, scale(layer, adapter))
        return adapted if gate is None else result + _gated(adapted - result, gate)
    inner, scaling = lora_a(layer.lora_dropout[adapter](x)), layer.scaling[adapter]
    if lora_b.bias is None:
        # Gated where it is narrow: autograd saves the factor of a gate with a gradient.
        delta: Tensor = lora_b(_gated(inner, gate)) * scaling
    else:
        delta = _gated(lora_b(inner) * scaling, gate)
    return result + delta


def _dora(layer: Any, adapter: str, x: Tensor, result: Tensor, scale: Tensor) -> Tensor:
    """`f x (W + s A B)` and the base layer's bias as it is, `f` DoRA's factor; summed in PEFT's order."""
    bias = getattr(layer.get_base_layer(), "bias", None)
    delta = functional.linear(functional.linear(x, layer.lora_A[adapter].weight), layer.lora_B[adapter].weight)
    bare = result if bias is None else result - bias
    adapted: Tensor = result + ((scale - 1) * bare + scale * delta * layer.scaling[adapter])
    return adapted


@torch.no_grad()
def dora_scale(layer: Any, adapter: str) -> Tensor:
    """`m / |W + s B A|`, the factor that DoRA gives to each output of a layer (Liu et al. 2024, equation 5).

    Returns:
        (d_out), of the type of `lora_A`; a constant for the gradient.
    """
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    base = transpose(dequantize_module_weight(layer.get_base_layer()), getattr(layer, "fan_in_fan_out", False))
    norms = [
        torch.linalg.vector_norm(rows.to(a.device, torch.float32) + layer.scaling[adapter] * (up @ a).float(), dim=1)
        for rows, up in zip(base.split(ROWS_AT_ONCE), b.split(ROWS_AT_ONCE), strict=True)
    ]
    magnitude: Tensor = layer.lora_magnitude_vector[adapter].weight
    return (magnitude.float() / torch.cat(norms)).to(a.dtype)


def expert_sum(
    x: Tensor, result: Tensor, a: Tensor, b: Tensor, gate: Tensor | None, index: Tensor | None, scaling: float
) -> Tensor:
    """[`ExpertSum`], or the same written into `result` where there are no gradients."""
    if torch.is_grad_enabled():
        summed: Tensor = ExpertSum.apply(x, result, a, b, gate, index, scaling)  # type: ignore[no-untyped-call]
        return summed
    delta = functional.linear(_gated(functional.linear(_at(x, index).to(a.dtype), a), gate), b)
    if index is None:
        return result.add_(delta, alpha=scaling)
    return result.index_copy_(0, index, result.index_select(0, index).add_(delta, alpha=scaling))


class ExpertSum(torch.autograd.Function):
    """`result + s * (g * x A) B` where an expert was chosen, and `result` elsewhere.

    Plain autograd would save a copy of `x` in the adapter's precision for every module, and all of `x A B` for the
    gate's gradient. This saves `x` itself, which modules with the same input share, and `g * x A`, which is as narrow
    as the rank; the backward pass casts and selects again. Other rows are neither computed nor saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        result: Tensor,
        a: Tensor,
        b: Tensor,
        gate: Tensor | None,
        index: Tensor | None,
        scaling: float,
    ) -> Tensor:
        """The layer's output, rounded once to the type of `result`. Shapes are those of [`add_expert`]."""
        inner = functional.linear(_at(x, index).to(a.dtype), a)
        ctx.save_for_backward(x, a, b, inner, gate, index)
        ctx.scaling = scaling
        delta = functional.linear(_gated(inner, gate), b)
        # Rounded like the layer's output, so a row's result does not depend on the routes of other rows.
        part = torch.add(_at(result, index), delta, alpha=scaling).to(result.dtype)
        return part if index is None else result.index_copy(0, index, part)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Gradients of `x`, `result`, `a`, `b` and `gate`."""
        x, a, b, inner, gate, index = ctx.saved_tensors
        of_x, of_a, of_b, of_gate = (ctx.needs_input_grad[index] for index in (0, 2, 3, 4))
        outer = _at(gradients[0], index).to(b.dtype)
        # Scaled where it is narrow.
        to_gated = (outer @ b).mul_(ctx.scaling)
        to_inner = _gated(to_gated, gate)
        to_b = _weight_gradient(outer, _gated(inner, gate) * ctx.scaling) if of_b else None
        to_a = _weight_gradient(to_inner, _at(x, index).to(a.dtype)) if of_a else None
        to_gate = (to_gated * inner).flatten(1).sum(dim=1, dtype=gate.dtype) if of_gate else None
        to_x = None
        if of_x:
            to_x = (to_inner @ a).to(x.dtype)
            if index is not None:
                to_x = torch.zeros_like(x).index_copy_(0, index, to_x)
        return to_x, gradients[0], to_a, to_b, to_gate, None, None


def _at(tensor: Tensor, index: Tensor | None) -> Tensor:
    return tensor if index is None else tensor.index_select(0, index)


def _gated(inner: Tensor, gate: Tensor | None) -> Tensor:
    return inner if gate is None else inner * gate.to(inner.dtype).reshape(-1, *[1] * (inner.dim() - 1))


def _weight_gradient(outer: Tensor, inner: Tensor) -> Tensor:
    return outer.flatten(0, -2).T @ inner.flatten(0, -2)
