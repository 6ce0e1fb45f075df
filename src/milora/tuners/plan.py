"""Intercepts calls of PEFT's layers: the running pass's plan computes the output."""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from milora.tuners.context import ContextOwner, running


class Plan(Protocol):
    """Defines how the adapted layers of a model compute one forward pass.

    Attributes:
        is_packed: Whether the batch is one row with the tokens of many requests. Each token is then a row of the plan.
    """

    is_packed: bool

    def forward(self, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the output of an adapted layer.

        Args:
            layer: The PEFT layer, with its `base_layer`.
            x: The input, (batch, tokens, d_in), or (batch * tokens, d_in) if the block flattens it.
            *args: Passed to the base layer.
            **kwargs: Passed to the base layer.
        """

    def rows_of(self, rows: int) -> dict[str, list[int]] | None:
        """Returns adapter -> its rows for modules that PEFT copies per adapter (`modules_to_save`). `None` leaves the
        choice to PEFT.

        Args:
            rows: Number of rows of the module's input.
        """


class BasePlan:
    """Computes only the base layers, whose weights contain a merged route's experts."""

    is_packed = False

    def forward(self, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See [`Plan.forward`]."""
        return layer.base_layer(x, *args, **kwargs)

    def rows_of(self, rows: int) -> None:
        """See [`Plan.rows_of`]."""
        return


class PlannedModule:
    """A mixin for PEFT's modules, added by [`plan_module`]: the running pass's plan computes the module's output.

    Attributes:
        kind: The original class of the module.
        owner: The model's owner of contexts.
        stack: The stack of a LoRA layer's adapters. A copy starts without one.
    """

    kind: type[nn.Module]
    owner: ContextOwner
    stack: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is created at run time, so a pickle names its two base classes.
        return _blank, (type(self).__bases__[0], self.kind), {**self.__dict__, "stack": None}


class PlannedLayer(PlannedModule):
    """The mixin of PEFT's LoRA layers."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Computes the output with the running pass's plan, or with PEFT's forward if no pass is running."""
        if torch.compiler.is_dynamo_compiling():
            if self.stack is not None and self.owner.is_compiled and self.stack.fixed is not None:
                kwargs.pop("adapter_names", None)
                return self.stack.fixed_rows().add_to(self.base_layer(x, *args, **kwargs), x)  # type: ignore[attr-defined]
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        context = running(self.owner)
        if context is None:
            return self.without_context(x, *args, **kwargs)
        return context.plan.forward(self, x, *args, **kwargs)

    def without_context(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Computes the output outside a pass: PEFT's forward, unless a subclass overrides it."""
        return self.pefts_forward(x, *args, **kwargs)

    def pefts_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """PEFT's own forward."""
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]


def plan_module(module: Any, mixin: type[PlannedModule], owner: ContextOwner) -> None:
    """Adds a mixin to a PEFT module of any kind; a second call does nothing."""
    if not isinstance(module, PlannedModule):
        kinds: tuple[Any, Any] = mixin, type(module)
        module.__class__ = _mixed(*kinds)
        module.owner, module.stack = owner, None


@cache
def _mixed(mixin: Any, kind: Any) -> Any:
    return type(kind.__name__, (mixin, kind), {"kind": kind, "__doc__": kind.__doc__, "__module__": __name__})


def _blank(mixin: Any, kind: Any) -> Any:
    made = _mixed(mixin, kind)
    return made.__new__(made)
