"""Factors for the output of a linear module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from milora.backbone.blocks import out_features
from milora.tuners.attachment import Attachment
from milora.tuners.ia3.config import IA3ProjectedConfig
from milora.tuners.projected_vector import ProjectedVector


class IA3ProjectedLayer(Attachment):
    """`y = (1 + v) * (W x + b)`, elementwise, with the learned `v` (d_out), which starts at zero."""

    child_name = "ia3_projected_"
    adapter_layer_names = ("scale_vector",)

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.scale_vector = nn.ModuleDict()

    def update_layer(self, adapter: str, module: nn.Module, config: IA3ProjectedConfig) -> None:
        """See [`Attachment.update_layer`]."""
        self.scale_vector[adapter] = ProjectedVector(out_features(module), config.projection_dim)

    def adapt(self, adapter: str, hidden: Tensor, output: Tensor) -> Tensor:
        """See [`Attachment.adapt`]."""
        return torch.addcmul(output, output, self.scale_vector[adapter]())
