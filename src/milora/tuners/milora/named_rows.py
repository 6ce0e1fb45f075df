"""Rows with different MiLoRA adapters (`adapter_names`), each on its own route, served together by `grouped_lora`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from milora.tuners.grouped import GroupedServing, ModuleStack, Share
from milora.tuners.milora.dispatch import Dispatcher
from milora.tuners.milora.expert import ExpertVariant
from milora.tuners.milora.routing_pass import RoutingPass
from milora.tuners.milora.selection import routing_of


class RoutedServing(GroupedServing):
    """Serves what the running [`RoutingPass`] says: its rows' adapters, and their routers' gates.

    Args:
        model: The backbone with PEFT's layers in it.
        dispatcher: Where the running pass is.
    """

    eagerly = "compiled=False"

    def __init__(self, model: nn.Module, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        super().__init__(model)

    @property
    def is_compiled(self) -> bool:
        """Whether any thread's decode steps are compiled; traced hooks ask the dispatcher for it."""
        return self.dispatcher.is_compiled

    @is_compiled.setter
    def is_compiled(self, value: bool) -> None:
        self.dispatcher.is_compiled = value

    @contextmanager
    def naming_rows(self, names: list[str]) -> Iterator[None]:
        """In force: an adapter for each row, or for as many rows in succession as beams and return sequences make."""
        with self.dispatcher.naming_rows(names), self.serving():
            yield

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

    def names(self, batch: RoutingPass, x: Tensor) -> None:
        """See [`GroupedServing.names`]: experts read the pass themselves."""

    def adapter_rows(self, batch: RoutingPass, x: Tensor) -> Mapping[str, list[int]] | None:
        """See [`GroupedServing.adapter_rows`].

        Raises:
            MiLoraError: If a module's input does not have the batch's rows.
        """
        if not self.names_rows():
            return None
        batch.check_rows(x)
        return {adapter: rows for adapter, rows in batch.adapter_rows.items() if rows is not None}

    def names_rows(self) -> bool:
        """See [`GroupedServing.names_rows`]."""
        return self.dispatcher.adapter_names is not None

    def shares(self, batch: RoutingPass, module: ModuleStack, x: Tensor) -> Iterator[Share]:
        """See [`GroupedServing.shares`].

        Raises:
            MiLoraError: If a module's input does not have the batch's rows.
        """
        if self.names_rows():
            batch.check_rows(x)
        for adapter, rows in batch.adapter_rows.items():
            variant = module.layer.lora_variant.get(adapter)
            if isinstance(variant, ExpertVariant):
                decision = routing_of(batch.routings, adapter, variant.block).decision
                yield Share(adapter, rows, decision.gates[:, variant.expert])
