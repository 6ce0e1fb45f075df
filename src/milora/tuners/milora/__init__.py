"""MiLoRA as a PEFT method.

From a call to a kernel: `model.py` (PEFT's tuner interface, `generate`, `use_route`) -> `forward.py` (one call of the
backbone) -> `router.py` (a block's router) -> `expert.py` (a LoRA layer uses the running pass's plan) -> `plans/`
(`passes.py`, `decode.py`, and `tuners/grouped/plan.py` for rows with their own adapters; every formula is in
`plans/formulas.py`).

`routed.py` has the decisions for a batch of prompts, `routes.py` computes them without generating. `config.py` and
`targets.py` define which modules are experts, `statistics.py` is for training, `merging.py` and `export.py` use a
route.
"""

from milora.tuners.milora.config import MiLoraConfig
from milora.tuners.milora.model import MiLoraModel
from milora.tuners.registry import refuse_other_settings, register
from milora.tuners.rollback import RevertibleTuner

register("MILORA", MiLoraConfig, MiLoraModel, prefix="lora_")
refuse_other_settings(RevertibleTuner)

__all__ = ["MiLoraConfig", "MiLoraModel"]
