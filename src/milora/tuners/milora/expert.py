"""The LoRA of a module as an expert of its block's router: it runs only for the rows that chose it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from milora.tuners.milora.routed import Place
from milora.tuners.plan import PlannedLayer
from milora_core.errors import MiLoraError

NO_MERGE = (
    "A MiLoRA adapter cannot be merged permanently, because the adapted modules depend on the prompt. To merge for "
    "one generation, use model.generate(..., merge_route=True). To merge one route permanently, export it as a plain "
    "LoRA adapter (milora export) and merge that."
)


class ExpertLayer(PlannedLayer):
    """A LoRA layer of PEFT, of any kind, whose adapters are experts.

    The layer's output is `x W + g (expert(x) - x W)` for the rows that chose it, with gate `g`, and `x W` for the
    others, without further computation (Zhang et al. 2024, section 3).

    Attributes:
        expert_places: Adapter -> its [`Place`].
    """

    expert_places: dict[str, Place]
    active_adapters: list[str]
    disable_adapters: bool

    def without_context(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """PEFT's forward; raises a `RuntimeError` if an expert is active, because there is no route."""
        active = [adapter for adapter in self.active_adapters if adapter in self.expert_places]
        if active and not self.disable_adapters:
            block = self.expert_places[active[0]].block
            raise RuntimeError(f"A layer of {block} was called outside the model: there is no route. Call the model.")
        return super().without_context(x, *args, **kwargs)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """`False`: a module's change depends on the prompt; `milora export` freezes a route."""
        return False

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Refused: always raises a [`MiLoraError`]."""
        raise MiLoraError(NO_MERGE)
