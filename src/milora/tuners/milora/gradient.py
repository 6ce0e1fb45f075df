"""Gradients that plain autograd would lose: of gates under gradient checkpointing, and of experts nobody chose."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from milora.tuners.prompt_pass import PromptPasses

CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"
"""Where transformers keeps the function that a block runs itself through under gradient checkpointing."""


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


class CheckpointWithRoute:
    """A block's checkpoint function, made to recompute the block under the route of its own forward pass.

    By the time of the backward pass another forward may have run, or none is running. Where transformers runs a
    module's hooks inside the checkpoint (before 5.2x), `route_block` routes here, outside it, so that the router runs
    once and its loss has a graph in either case.
    """

    def __init__(
        self, function: Callable[..., Any], dispatcher: PromptPasses, route_block: Callable[[Tensor], Tensor]
    ) -> None:
        self.function = function
        self.dispatcher = dispatcher
        self.route_block = route_block

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoints `run(*args)`, whose first argument is the block's input."""
        if args and isinstance(args[0], Tensor):
            args = (self.route_block(args[0]), *args[1:])
        resumed = partial(self._resume, self.dispatcher.current, run)
        return self.function(resumed, *args, **kwargs)

    def _resume(self, routing_pass: Any, run: Callable[..., Any], *args: Any) -> Any:
        with self.dispatcher.resuming(routing_pass):
            return run(*args)


def is_checkpointed(block: nn.Module) -> bool:
    """Whether a block will be run under transformers' gradient checkpointing."""
    return bool(getattr(block, "gradient_checkpointing", False)) and block.training


def checkpoint_with_route(block: nn.Module, dispatcher: PromptPasses, route_block: Callable[[Tensor], Tensor]) -> None:
    """Wraps a block's checkpoint function, once; `gradient_checkpointing_enable` may have set a new one."""
    function = getattr(block, CHECKPOINT_FUNCTION, None)
    if function is not None and not isinstance(function, CheckpointWithRoute):
        setattr(block, CHECKPOINT_FUNCTION, CheckpointWithRoute(function, dispatcher, route_block))


def restore_checkpoint_function(block: nn.Module) -> None:
    """Undoes [`checkpoint_with_route`]."""
    function = getattr(block, CHECKPOINT_FUNCTION, None)
    if isinstance(function, CheckpointWithRoute):
        setattr(block, CHECKPOINT_FUNCTION, function.function)
