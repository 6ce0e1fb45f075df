"""The tuner of Learned-Adapter."""

from __future__ import annotations

from typing import Any

from torch import nn

from milora.tuners.bottleneck import BottleneckModel
from milora.tuners.learned_adapter.cell import SearchCell
from milora.tuners.learned_adapter.layer import LearnedAdapterLayer
from milora_core.errors import MiLoraError


class LearnedAdapterModel(BottleneckModel):
    """A backbone with searched bottlenecks parallel to its sub-layers.

    Created by `get_peft_model(model, LearnedAdapterConfig())`. If the configuration has no `architecture`, the adapter
    searches: its layers hold all candidates, and each call of [`LearnedAdapterModel.drop_weakest`] drops the weakest.
    When one candidate is left, the configuration gets its `architecture`.

    An adapter saved during the search keeps the candidates and their weights, so loading it resumes the search.
    """

    method = "Learned-Adapter"
    prefix = "learned_adapter_"
    tuner_layer_cls = LearnedAdapterLayer

    @property
    def is_searching(self) -> bool:
        """Whether an active adapter is still searching."""
        return bool(self._active_cells())

    @property
    def rounds(self) -> int:
        """Number of calls of [`LearnedAdapterModel.drop_weakest`] in the active adapters' whole search."""
        return max((cell.rounds for cell in self._active_cells()), default=0)

    @property
    def rounds_left(self) -> int:
        """Number of remaining calls of [`LearnedAdapterModel.drop_weakest`]."""
        return max((cell.rounds_left for cell in self._active_cells()), default=0)

    def architecture_parameters(self) -> list[nn.Parameter]:
        """The architecture weights of the active adapters; none after the search."""
        return [weights for cell in self._active_cells() for weights in cell.architecture_weights]

    def drop_weakest(self) -> None:
        """Drops the weakest activation and the weakest operation of every layer of the active adapters.

        When one of each is left, it replaces the candidates, and the adapter's configuration gets the `architecture`.
        The dropped candidates' parameters are then removed from the model, but not from an optimizer.

        Raises:
            MiLoraError: If no active adapter is searching.
        """
        if not self.is_searching:
            raise MiLoraError(f"The search of {self.active_adapters} is finished: there is nothing left to drop.")
        for adapter in self.active_adapters:
            cells = self._cells(adapter)
            for cell in cells.values():
                cell.drop_weakest()
            if cells and all(cell.is_decided for cell in cells.values()):
                layers = self._layers()
                self.peft_config[adapter].architecture = {
                    path: layers[path].settle(adapter, cell) for path, cell in cells.items()
                }

    def reset_parameters(self) -> None:
        """Initialises the active adapters' parameters again, except the architecture weights."""
        for adapter in self.active_adapters:
            for layer in self._layers().values():
                if adapter in layer.bottleneck:
                    for module in layer.bottleneck[adapter].modules():
                        reset = getattr(module, "reset_parameters", None)
                        if reset is not None:
                            reset()

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        prepared = super()._prepare_adapter_config(peft_config, model_config)
        if prepared.architecture is not None:
            differing = sorted(set(prepared.architecture) ^ prepared.module_paths)
            if differing:
                raise MiLoraError(
                    f"The architecture is for other modules: they differ in {differing[:2]}. Set architecture=None to "
                    "search for one."
                )
        return prepared

    def _layers(self) -> dict[str, LearnedAdapterLayer]:
        return {path: layer for path, layer in self.layers().items() if isinstance(layer, LearnedAdapterLayer)}

    def _active_cells(self) -> list[SearchCell]:
        return [cell for adapter in self.active_adapters for cell in self._cells(adapter).values()]

    def _cells(self, adapter: str) -> dict[str, SearchCell]:
        cells = {path: layer.search_cell(adapter) for path, layer in self._layers().items()}
        return {path: cell for path, cell in cells.items() if cell is not None}
