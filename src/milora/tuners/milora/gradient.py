"""Gradients that plain autograd would lose: of gates under gradient checkpointing, and of experts that nobody chose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
