"""Rows with different MiLoRA adapters, each on its own route, served together by `grouped_lora`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from milora.tuners.grouped import GroupedServing, ModuleStack, Share
from milora.tuners.milora.dispatch import Dispatcher, RoutingPass
from milora.tuners.milora.expert import ExpertVariant


class RoutedServing(GroupedServing):
    """Serves what the running [`RoutingPass`] says: its rows' adapters, and their routers' gates.

    Args:
        model: The backbone with PEFT's layers in it.
        dispatcher: Where the running pass is.
        names: An adapter for each row of a pass, refused where a module's input does not have its rows.
    """

    def __init__(self, model: nn.Module, dispatcher: Dispatcher, names: Callable[[Tensor], list[str] | None]) -> None:
        self.dispatcher = dispatcher
        super().__init__(model)
        self.row_names = names

    @property
    def is_compiled(self) -> bool:
        """Whether any thread's decode steps are compiled; traced hooks ask the dispatcher for it."""
        return self.dispatcher.is_compiled

    @is_compiled.setter
    def is_compiled(self, value: bool) -> None:
        self.dispatcher.is_compiled = value

    def is_plain(self, layer: LoraLayer, adapter: str) -> bool:
        """See [`GroupedServing.is_plain`]; gates are what the operator is for."""
        variant = layer.lora_variant.get(adapter)
        return variant is None or (isinstance(variant, ExpertVariant) and variant.inner is None)

    def batch(self) -> RoutingPass | None:
        """The running pass, if its rows have adapters of their own or its steps are compiled."""
        running: RoutingPass | None = self.dispatcher.current
        if running is None or (self.dispatcher.adapter_names is None and not self.is_compiled_here()):
            return None
        return running

    def kept(self, batch: RoutingPass) -> dict[Any, Any]:
        """See [`GroupedServing.kept`]."""
        return batch.values

    def rows(self, batch: RoutingPass, x: Tensor) -> int:
        """See [`GroupedServing.rows`]."""
        return batch.rows

    def names(self, batch: RoutingPass, x: Tensor) -> list[str] | None:
        """See [`GroupedServing.names`]."""
        return self.row_names(x)

    def shares(self, batch: RoutingPass, module: ModuleStack, x: Tensor) -> Iterator[Share]:
        """See [`GroupedServing.shares`]."""
        self.row_names(x)
        for adapter, rows in batch.adapter_rows.items():
            variant = module.layer.lora_variant.get(adapter)
            if isinstance(variant, ExpertVariant):
                decision = batch.routings[adapter][variant.block].decision
                yield Share(adapter, rows, decision.gates[:, variant.expert])
