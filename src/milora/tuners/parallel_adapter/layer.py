"""A bottleneck parallel to a sub-layer."""

from __future__ import annotations

from torch import nn

from milora.tuners.bottleneck import Activation, BottleneckLayer
from milora.tuners.parallel_adapter.config import ParallelAdapterConfig


class ParallelAdapterLayer(BottleneckLayer):
    """`h = sublayer(x) + scale * act(x D^T) U^T`, with `D` (r, d) and `U` (d, r)."""

    child_name = "parallel_adapter_"

    def build_inner(self, config: ParallelAdapterConfig) -> nn.Module:
        """See [`BottleneckLayer.build_inner`]."""
        return Activation(config.activation)
