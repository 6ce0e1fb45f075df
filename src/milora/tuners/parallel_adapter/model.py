"""The tuner of Parallel-Adapter."""

from __future__ import annotations

from milora.tuners.bottleneck import BottleneckModel
from milora.tuners.parallel_adapter.layer import ParallelAdapterLayer


class ParallelAdapterModel(BottleneckModel):
    """A backbone with bottlenecks parallel to its sub-layers.

    Created by `get_peft_model(model, ParallelAdapterConfig())`.
    """

    method = "Parallel-Adapter"
    prefix = "parallel_adapter_"
    tuner_layer_cls = ParallelAdapterLayer
