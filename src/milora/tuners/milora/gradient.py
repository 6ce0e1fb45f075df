"""Gradients that plain autograd would lose: of gates under gradient checkpointing, and of experts that no row chose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RouteGradient(torch.autograd.Function):
    """The identity on a block's input, which passes gradients to tensors that the block's graph does not reach.

    Gates: under (reentrant) checkpointing a block cannot send a gradient to a tensor outside it other than its input.
    Its layers therefore read a detached leaf of the gates. When the gradient of the block's input is complete, the
    leaf's is too, and it is passed on here. The leaf is inside a list: as a direct argument, the graph of the first
    pass would wait for a gradient that never arrives.

    Idle parameters: those of experts that no row chose get a zero gradient. `None` would stall
    `DistributedDataParallel`, and leave optimisers without state for them.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gates: Tensor | None, leaf: list[Tensor], *idle: Tensor) -> Tensor:
        """Returns `hidden` unchanged."""
        ctx.leaf = leaf
        ctx.idle = [(tensor.shape, tensor.dtype, tensor.device) for tensor in idle]
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The gradient of the input unchanged, the leaf's for the gates, zeros for the idle parameters."""
        of_gates = None
        for leaf in ctx.leaf:
            # Removed, so a second backward pass through a retained graph does not count the first again.
            of_gates, leaf.grad = leaf.grad, None
            if of_gates is None:
                of_gates = torch.zeros_like(leaf)
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.idle]
        return gradients[0], of_gates, None, *zeros
