"""Rows with different MiLoRA adapters (`adapter_names`), each on its own route, served together by `grouped_lora`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from milora.errors import MiLoraError
from milora.tuners.grouped import BASE_ROW, GroupedServing, ModuleStack, Share
from milora.tuners.milora.dispatch import Dispatcher
from milora.tuners.milora.expert import ExpertVariant
from milora.tuners.milora.routing_pass import RoutingPass


class RoutedServing(GroupedServing):
    """Serves what the running [`RoutingPass`] says: its rows' adapters, and their routers' gates.

    Args:
        model: The backbone with PEFT's layers in it.
        dispatcher: Where the running pass is.
    """

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
        with self.serving(), self.dispatcher.naming_rows(names):
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

    def shares(self, batch: RoutingPass, module: ModuleStack, x: Tensor) -> Iterator[Share]:
        """See [`GroupedServing.shares`].

        Raises:
            MiLoraError: If a module's input does not have the batch's rows.
        """
        if self.dispatcher.adapter_names is not None:
            batch.check_rows(x)
        for adapter, rows in batch.adapter_rows.items():
            variant = module.layer.lora_variant.get(adapter)
            if isinstance(variant, ExpertVariant):
                decision = batch.routings[adapter][variant.block].decision
                yield Share(adapter, rows, decision.gates[:, variant.expert])


def rows_by_adapter(names: list[str], rows: int) -> dict[str, list[int]]:
    """Adapter -> its rows, in a batch of `rows` rows; beams of a row follow each other.

    Args:
        names: The adapter of each prompt, [`BASE_ROW`] for none.
        rows: How many rows the batch has.

    Raises:
        MiLoraError: If the rows are not a multiple of the names.
    """
    names = _expanded(names, rows)
    return {
        name: [row for row, of_row in enumerate(names) if of_row == name]
        for name in dict.fromkeys(names)
        if name != BASE_ROW
    }


def _expanded(names: list[str], rows: int) -> list[str]:
    if not names or rows % len(names) != 0:
        raise MiLoraError(f"adapter_names names {len(names)} rows; the batch has {rows}.")
    return [name for name in names for _ in range(rows // len(names))]
