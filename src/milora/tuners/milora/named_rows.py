"""Rows with different MiLoRA adapters (`adapter_names`), each on its own route, served together by `grouped_lora`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from milora.errors import MiLoraError
from milora.tuners.grouped import BASE_ROW, GroupedServing, ModuleStack, Share, lora_layers
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
        """In force: an adapter for each row, or for as many rows in succession as beams and return sequences make.

        Modules that no stack serves are told the names as PEFT tells them, in a hook.
        """
        handles: list[Any] = []
        try:
            with self.serving(), self.dispatcher.naming_rows(names):
                for path, layer in lora_layers(self.model):
                    if path not in self.stacks.modules:
                        handles.append(layer.register_forward_pre_hook(self._name_rows, with_kwargs=True))
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _name_rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        running: RoutingPass | None = self.dispatcher.current
        names = None if running is None else self.names(running, args[0])
        return None if names is None else (args, {**kwargs, "adapter_names": names})

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
        """See [`GroupedServing.names`].

        Raises:
            MiLoraError: If a module's input does not have the batch's rows.
        """
        names = self.dispatcher.adapter_names
        if names is None:
            return None
        if x.shape[0] != batch.rows:
            raise MiLoraError(
                f"{type(self.model).__name__} flattens batch and tokens before one of the adapted modules, so rows "
                "with different adapters cannot be told apart there. Serve one adapter at a time."
            )
        return _expanded(names, batch.rows)

    def shares(self, batch: RoutingPass, module: ModuleStack, x: Tensor) -> Iterator[Share]:
        """See [`GroupedServing.shares`].

        Raises:
            MiLoraError: If a module's input does not have the batch's rows.
        """
        self.names(batch, x)
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
