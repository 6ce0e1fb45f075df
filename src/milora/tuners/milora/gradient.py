"""Gradients that plain autograd would lose, or keep too much for: of gates, of idle experts, of chosen ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


class RouteGradient(torch.autograd.Function):
    """The identity on a block's input, which brings gradients to tensors that the block does not lead back to.

    Gates: under (reentrant) checkpointing a block cannot send a gradient to a tensor outside it other than its input.
    Its layers therefore read a detached leaf of the gates. By the time that the gradient of the block's input is
    complete, so is the leaf's, and it is handed on from here. The leaf comes in a list: as an argument of its own, its
    gradient would be waited for in the graph of the first pass, where it never arrives.

    Idle parameters: those of experts that no row chose get a zero gradient. `None` would stall
    `DistributedDataParallel`, and leave optimisers without state for them.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gates: Tensor | None, leaf: list[Tensor], *idle: Tensor) -> Tensor:
        """Returns `hidden` as it is."""
        ctx.leaf = leaf
        ctx.idle = [(tensor.shape, tensor.dtype, tensor.device) for tensor in idle]
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The gradient of the input as it is, that of the leaf for the gates, zeros for the idle."""
        of_gates = None
        for leaf in ctx.leaf:
            # Taken away, so that a second backward through a retained graph does not count the first again.
            of_gates, leaf.grad = leaf.grad, None
            if of_gates is None:
                of_gates = torch.zeros_like(leaf)
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.idle]
        return gradients[0], of_gates, None, *zeros


class ExpertSum(torch.autograd.Function):
    """`result + s * (g * x A) B` for the rows that chose an expert, and `result` for the others.

    Plain autograd would keep a copy of `x` in the adapter's precision for every module, and the gate's gradient the
    whole of `x A B`. This keeps `x` as it came, which modules with the same input share, and `g * x A`, which is as
    narrow as the rank; what was cast or cut out is so again in the backward pass. The other rows are neither computed
    nor kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        result: Tensor,
        a: Tensor,
        b: Tensor,
        gate: Tensor | None,
        rows: Tensor | None,
        scaling: float,
    ) -> Tensor:
        """The layer's output, rounded once to the type of `result`.

        Args:
            ctx: torch's.
            x: (batch, ..., d_in).
            result: (batch, ..., d_out), the base layer's output.
            a: (r, d_in).
            b: (d_out, r).
            gate: (rows), float32, or `None` for ones without a gradient.
            rows: The rows that chose the expert, `None` for all.
            scaling: `s`.
        """
        inner = functional.linear(_rows(x, rows).to(a.dtype), a)
        ctx.save_for_backward(x, a, b, inner, gate, rows)
        ctx.scaling = scaling
        delta = functional.linear(_gated(inner, gate), b)
        # Rounded as the layer's output will be, so that a row's result does not depend on its neighbours' routes.
        part = torch.add(_rows(result, rows), delta, alpha=scaling).to(result.dtype)
        return part if rows is None else result.index_copy(0, rows, part)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Gradients of `x`, `result`, `a`, `b` and `gate`."""
        x, a, b, inner, gate, rows = ctx.saved_tensors
        of_x, of_a, of_b, of_gate = (ctx.needs_input_grad[index] for index in (0, 2, 3, 4))
        outer = _rows(gradients[0], rows).to(b.dtype)
        # Scaled where it is narrow.
        to_gated = (outer @ b).mul_(ctx.scaling)
        to_inner = _gated(to_gated, gate)
        to_b = _weight_gradient(outer, _gated(inner, gate) * ctx.scaling) if of_b else None
        to_a = _weight_gradient(to_inner, _rows(x, rows).to(a.dtype)) if of_a else None
        to_gate = (to_gated * inner).flatten(1).sum(dim=1, dtype=gate.dtype) if of_gate else None
        to_x = None
        if of_x:
            to_x = (to_inner @ a).to(x.dtype)
            if rows is not None:
                to_x = torch.zeros_like(x).index_copy_(0, rows, to_x)
        return to_x, gradients[0], to_a, to_b, to_gate, None, None


def expert_sum(
    x: Tensor, result: Tensor, a: Tensor, b: Tensor, gate: Tensor | None, rows: Tensor | None, scaling: float
) -> Tensor:
    """[`ExpertSum`], or the same written into `result` where there are no gradients."""
    if torch.is_grad_enabled():
        summed: Tensor = ExpertSum.apply(x, result, a, b, gate, rows, scaling)  # type: ignore[no-untyped-call]
        return summed
    delta = functional.linear(_gated(functional.linear(_rows(x, rows).to(a.dtype), a), gate), b)
    if rows is None:
        return result.add_(delta, alpha=scaling)
    return result.index_copy_(0, rows, result.index_select(0, rows).add_(delta, alpha=scaling))


def _rows(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor.index_select(0, rows)


def _gated(inner: Tensor, gate: Tensor | None) -> Tensor:
    return inner if gate is None else inner * gate.to(inner.dtype).reshape(-1, *[1] * (inner.dim() - 1))


def _weight_gradient(outer: Tensor, inner: Tensor) -> Tensor:
    return outer.flatten(0, -2).T @ inner.flatten(0, -2)
