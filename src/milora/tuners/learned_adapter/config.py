"""`LearnedAdapterConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from milora.tuners.bottleneck import BottleneckConfig, check_names
from milora.tuners.learned_adapter.operations import OPERATIONS
from milora.tuners.registry import add_peft_type
from milora_core.errors import MiLoraError
from milora_core.routing.rational import ACTIVATIONS


@dataclass
class LearnedAdapterConfig(BottleneckConfig):
    """Configuration of Learned-Adapter, in our reading.

    We did not have the method's full text. We know that it searches, per layer, for the activation and the operation
    inside the bottleneck, and gradually drops the weakest candidate. Our own choices are the place of the adapter
    (parallel to both sub-layers, scaled by 4), the set of operations, and the softmax that weights the candidates (as
    in DARTS, Liu et al. 2019). With the defaults, a found architecture has 83.9M to 84.1M parameters on Llama-2 7B; the
    MiLoRA paper reports 81.8M.

    Args:
        activations: The candidate activations, from [`milora_core.routing.rational.ACTIVATIONS`].
        operations: The candidate operations, from [`milora.tuners.learned_adapter.operations.OPERATIONS`].
        architecture: The `activation` and the `operation` of each adapted module, by its path in the backbone. Without
            it, a search starts and fills it in when it ends; see
            [`milora.training.learned_adapter_search.LearnedAdapterSearch`].

    Raises:
        MiLoraError: If a list is empty, or a name is unknown.
    """

    activations: list[str] = field(default_factory=lambda: ["relu", "gelu", "silu", "tanh"])
    operations: list[str] = field(default_factory=lambda: list(OPERATIONS))
    architecture: dict[str, dict[str, str]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("LEARNED_ADAPTER")
        check_names("activations", self.activations, ACTIVATIONS)
        check_names("operations", self.operations, OPERATIONS)
        for path, choice in (self.architecture or {}).items():
            _check_choice(path, choice)


def _check_choice(path: str, choice: Any) -> None:
    if not isinstance(choice, dict) or set(choice) != {"activation", "operation"}:
        raise MiLoraError(f"architecture[{path!r}] must have an activation and an operation; found {choice!r}.")
    check_names(f"architecture[{path!r}]", [choice["activation"]], ACTIVATIONS)
    check_names(f"architecture[{path!r}]", [choice["operation"]], OPERATIONS)
