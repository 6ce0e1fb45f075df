"""Makes transformers' gradient checkpointing recompute a block in the context of its own forward pass. No other file
changes it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from milora.tuners.context import ContextOwner, ForwardContext, entered, running

CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"
"""The attribute of a block in which transformers keeps the gradient checkpointing function."""


class CheckpointInContext:
    """A block's checkpoint function that recomputes the block in the context of its own forward pass.

    At the backward pass, another forward pass may have run, or none is running. `prepare`, if given, is called with the
    block's input outside the checkpoint and returns it. Some versions of transformers run a module's hooks inside the
    checkpoint; `prepare` then does the work that must happen once and outside.

    Args:
        function: transformers' checkpoint function.
        owner: The model's owner of contexts.
        prepare: Called with the block's input; must do nothing if a hook has already done the work.
    """

    def __init__(
        self, function: Callable[..., Any], owner: ContextOwner, prepare: Callable[[Tensor], Tensor] | None
    ) -> None:
        self.function = function
        self.owner = owner
        self.prepare = prepare

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoints `run(*args)`, whose first argument is the block's input."""
        context = running(self.owner)
        if context is None:  # The adapters are disabled, or the block was called directly, which its own hook refuses.
            return self.function(run, *args, **kwargs)
        if self.prepare is not None and args and isinstance(args[0], Tensor):
            args = (self.prepare(args[0]), *args[1:])
        return self.function(partial(_run_in, context, run), *args, **kwargs)


def _run_in(context: ForwardContext, run: Callable[..., Any], *args: Any) -> Any:
    with entered(context):
        return run(*args)


def is_checkpointed(block: nn.Module) -> bool:
    """Whether a block runs under transformers' gradient checkpointing."""
    return bool(getattr(block, "gradient_checkpointing", False)) and block.training


def checkpoint_in_context(
    block: nn.Module, owner: ContextOwner, prepare: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Wraps a block's checkpoint function unless it is already wrapped. `gradient_checkpointing_enable` may set a new
    one at any time."""
    function = getattr(block, CHECKPOINT_FUNCTION, None)
    if function is not None and not isinstance(function, CheckpointInContext):
        setattr(block, CHECKPOINT_FUNCTION, CheckpointInContext(function, owner, prepare))


def restore_checkpoint_function(block: nn.Module) -> None:
    """Undoes [`checkpoint_in_context`]."""
    function = getattr(block, CHECKPOINT_FUNCTION, None)
    if isinstance(function, CheckpointInContext):
        setattr(block, CHECKPOINT_FUNCTION, function.function)
