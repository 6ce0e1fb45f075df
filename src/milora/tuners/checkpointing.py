"""The one place that meets transformers' gradient checkpointing: a block is recomputed under its own forward's pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from milora.tuners.prompt_pass import PromptPasses

CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"
"""Where transformers keeps the function that a block runs itself through under gradient checkpointing."""


class CheckpointWithPass:
    """A block's checkpoint function, made to recompute the block under the pass of its own forward.

    By the time of the backward pass another forward may have run, or none is running. `prepare` is given the block's
    input outside the checkpoint, and returns it: where a transformers runs a module's hooks inside, what must happen
    once and outside happens here all the same.

    Args:
        function: transformers' own.
        passes: What is in force.
        prepare: Called with the block's input; to do nothing where a hook has done it already.
    """

    def __init__(self, function: Callable[..., Any], passes: PromptPasses, prepare: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self.passes = passes
        self.prepare = prepare

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoints `run(*args)`, whose first argument is the block's input."""
        if args and isinstance(args[0], Tensor):
            args = (self.prepare(args[0]), *args[1:])
        resumed = partial(self._resume, self.passes.current, run)
        return self.function(resumed, *args, **kwargs)

    def _resume(self, routing_pass: Any, run: Callable[..., Any], *args: Any) -> Any:
        with self.passes.resuming(routing_pass):
            return run(*args)


def is_checkpointed(block: nn.Module) -> bool:
    """Whether a block will be run under transformers' gradient checkpointing."""
    return bool(getattr(block, "gradient_checkpointing", False)) and block.training


def checkpoint_with_pass(block: nn.Module, passes: PromptPasses, prepare: Callable[[Tensor], Tensor]) -> None:
    """Wraps a block's checkpoint function, once; `gradient_checkpointing_enable` may have set a new one."""
    function = getattr(block, CHECKPOINT_FUNCTION, None)
    if function is not None and not isinstance(function, CheckpointWithPass):
        setattr(block, CHECKPOINT_FUNCTION, CheckpointWithPass(function, passes, prepare))


def restore_checkpoint_function(block: nn.Module) -> None:
    """Undoes [`checkpoint_with_pass`]."""
    function = getattr(block, CHECKPOINT_FUNCTION, None)
    if isinstance(function, CheckpointWithPass):
        setattr(block, CHECKPOINT_FUNCTION, function.function)
