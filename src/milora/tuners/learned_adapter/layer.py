"""A bottleneck parallel to a sub-layer, with a searched inside."""

from __future__ import annotations

from torch import nn

from milora.tuners.bottleneck import BottleneckLayer
from milora.tuners.learned_adapter.cell import Cell, SearchCell
from milora.tuners.learned_adapter.config import LearnedAdapterConfig
from milora.tuners.learned_adapter.operations import OPERATIONS


class LearnedAdapterLayer(BottleneckLayer):
    """`h = sublayer(x) + scale * operation(activation(x D^T)) U^T`, with `D` (r, d) and `U` (d, r)."""

    child_name = "learned_adapter_"

    def build_inner(self, config: LearnedAdapterConfig) -> nn.Module:
        """See [`BottleneckLayer.build_inner`]."""
        if config.architecture is None:
            return SearchCell(config.bottleneck, config.activations, config.operations)
        choice = config.architecture[self.path]
        return Cell(choice["activation"], OPERATIONS[choice["operation"]](config.bottleneck))

    def search_cell(self, adapter: str) -> SearchCell | None:
        """The adapter's search cell in this layer; `None` after the search."""
        inner = self.bottleneck[adapter].inner if adapter in self.bottleneck else None
        return inner if isinstance(inner, SearchCell) else None

    def settle(self, adapter: str, cell: SearchCell) -> dict[str, str]:
        """Replaces a search cell by its highest-weighted candidates. Returns this layer's entry of `architecture`."""
        activation, operation = cell.found()
        self.bottleneck[adapter].inner = Cell(activation, cell.operations[operation])
        return {"activation": activation, "operation": operation}
