"""MiLoRA as a PEFT method.

From a call to a kernel: `model.py` (what PEFT asks of a tuner) -> `routes.py` (`generate`, `route`, `use_route`) ->
`forward.py` (what a call of the backbone means) -> `router.py` (a block's router) -> `expert.py` (a LoRA layer asks the
running pass's plan) -> `plans/` (`passes.py`, `decode.py`, and `tuners/grouped/plan.py` for rows with their own
adapters; every formula is in `plans/formulas.py`).

`routed.py` is what was decided for a batch of prompts. `config.py` and `targets.py` say which modules are experts,
`statistics.py` and `gradient.py` are of training, `merging.py` and `export.py` use a route.
"""

from milora.tuners.milora.config import MiLoraConfig
from milora.tuners.milora.model import MiLoraModel
from milora.tuners.registry import refuse_other_settings, register
from milora.tuners.rollback import RevertibleTuner

register("MILORA", MiLoraConfig, MiLoraModel, prefix="lora_")
refuse_other_settings(RevertibleTuner)

__all__ = ["MiLoraConfig", "MiLoraModel"]
