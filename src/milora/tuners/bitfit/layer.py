"""A bias for a linear module."""

from __future__ import annotations

from torch import Tensor, nn

from milora.backbone.blocks import out_features
from milora.tuners.attachment import Attachment
from milora.tuners.bitfit.config import BitFitConfig
from milora.tuners.projected_vector import ProjectedVector


class BitFitLayer(Attachment):
    """`y = W x + b + v` with the backbone's own bias `b`, if any, and the learned `v` (d_out)."""

    child_name = "bitfit_"
    adapter_layer_names = ("bias_vector",)

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.bias_vector = nn.ModuleDict()

    def update_layer(self, adapter: str, module: nn.Module, config: BitFitConfig) -> None:
        """See [`Attachment.update_layer`]."""
        self.bias_vector[adapter] = ProjectedVector(out_features(module), config.projection_dim)

    def adapt(self, adapter: str, hidden: Tensor, output: Tensor) -> Tensor:
        """See [`Attachment.adapt`]."""
        vector: Tensor = self.bias_vector[adapter]()
        return output + vector
