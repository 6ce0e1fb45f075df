"""`ParallelAdapterConfig`."""

from __future__ import annotations

from dataclasses import dataclass

from milora.tuners.bottleneck import BottleneckConfig, check_names
from milora.tuners.registry import add_peft_type
from milora_core.routing.rational import ACTIVATIONS


@dataclass
class ParallelAdapterConfig(BottleneckConfig):
    """Configuration of Parallel-Adapter (He et al. 2021, arXiv 2110.04366).

    The defaults are the MiLoRA paper's settings: 83.89M parameters on Llama-2 7B.

    Args:
        activation: The activation inside the bottleneck, one of [`milora_core.routing.rational.ACTIVATIONS`].

    Raises:
        MiLoraError: If the activation is unknown.
    """

    activation: str = "relu"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("PARALLEL_ADAPTER")
        check_names("activation", [self.activation], ACTIVATIONS)
