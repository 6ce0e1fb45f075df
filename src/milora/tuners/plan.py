"""Intercepts PEFT's layers: a call computes what the running pass's plan defines."""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from milora.tuners.context import ContextOwner, running


class Plan(Protocol):
    """Defines how the adapted layers of a model compute one forward pass.

    Attributes:
        is_packed: Whether the batch is one row with the tokens of many requests, so that each token is a row here.
    """

    is_packed: bool

    def forward(self, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of an adapted layer.

        Args:
            layer: The layer, around its `base_layer`.
            x: What it was called with: (batch, tokens, d_in), or (batch * tokens, d_in) as some blocks flatten it.
            *args: Passed on to the base layer.
            **kwargs: Passed on to the base layer.
        """

    def rows_of(self, rows: int) -> dict[str, list[int]] | None:
        """Adapter -> its rows, for modules that PEFT keeps an adapter each (`modules_to_save`); `None` asks PEFT.

        Args:
            rows: Rows of the module's input.
        """


class BasePlan:
    """Adds nothing: a merged route's experts are in the base layers' weights."""

    is_packed = False

    def forward(self, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See [`Plan.forward`]."""
        return layer.base_layer(x, *args, **kwargs)

    def rows_of(self, rows: int) -> None:
        """See [`Plan.rows_of`]."""
        return


class PlannedModule:
    """A mixin for PEFT's modules, added by [`plan_module`]: the module computes what the running pass's plan defines.

    Attributes:
        kind: The class that the module had.
        owner: The model's.
        stack: The module's place in a model's stacks (LoRA layers); a copy starts without one.
    """

    kind: type[nn.Module]
    owner: ContextOwner
    stack: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so a pickle names the two that it is made of.
        return _blank, (type(self).__bases__[0], self.kind), {**self.__dict__, "stack": None}


class PlannedLayer(PlannedModule):
    """A LoRA layer of PEFT."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """PEFT's forward if no pass of the model is running or none of its adapters is active."""
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
        """As PEFT's; overridden where that would be wrong."""
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
