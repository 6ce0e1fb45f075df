"""The LoRA of a module as an expert of its block's router: it runs for the rows that chose it, and for no others."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

from milora.tuners.context import ContextOwner
from milora.tuners.milora.routed import Place
from milora.tuners.plan import PlannedLayer, plan_module
from milora_core.errors import MiLoraError

NO_MERGE = (
    "A MiLoRA adapter cannot be merged for good: which modules it changes depends on the prompt. For the length of a "
    "generation, model.generate(..., merge_route=True) does; to merge one route for good, export it as a plain LoRA "
    "adapter (milora export) and merge that."
)


class ExpertLayer(PlannedLayer):
    """A LoRA layer of PEFT, of any kind, whose adapters are experts.

    The layer's output is `x W + g (expert(x) - x W)` for the rows that chose it, with gate `g`, and `x W` for the
    others, for which nothing is computed (Zhang et al. 2024, section 3).

    Attributes:
        expert_places: Adapter -> its [`Place`].
    """

    expert_places: dict[str, Place]
    active_adapters: list[str]
    disable_adapters: bool

    def without_context(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """PEFT's forward, if no expert is at work.

        Raises:
            RuntimeError: If one is: there is no route.
        """
        if not self.disable_adapters:
            for adapter in self.active_adapters:
                if adapter in self.expert_places:
                    raise RuntimeError(
                        f"A layer of {self.expert_places[adapter].block} was called outside the model: there is no "
                        "route. Call the model."
                    )
        return super().without_context(x, *args, **kwargs)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """No: a module's change depends on the prompt; `milora export` freezes a route."""
        return False

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Refused.

        Raises:
            MiLoraError: Always.
        """
        raise MiLoraError(NO_MERGE)


def add_expert_place(layer: LoraLayer, adapter: str, place: Place, owner: ContextOwner) -> None:
    """Makes a layer's adapter an expert."""
    plan_module(layer, ExpertLayer, owner)
    places: dict[str, Place] = layer.__dict__.setdefault("expert_places", {})
    places[adapter] = place
