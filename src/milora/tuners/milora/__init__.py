"""MiLoRA as a PEFT method.

What it consists of: `config.py`; `model.py`, what PEFT asks of a tuner, with `targets.py` (which modules are experts)
and `routers.py` (the blocks' routers); `layer.py`, a block's router; `expert.py`, the LoRA of a module as an expert,
with `gradient.py` and `dora.py`.

What a pass consists of: `routing_pass.py`, which routers write and experts read; `selection.py`, a decision expert by
expert; `dispatch.py`, what is in force; `decoding.py`, what decode steps compute; `statistics.py`, of training.

What is done with routes: `generation.py`, `merging.py` with `shared_weights.py`, `named_rows.py` (`adapter_names`),
`export.py`.
"""

from milora.tuners.milora.config import MiLoraConfig
from milora.tuners.milora.model import MiLoraModel
from milora.tuners.registry import register

register("MILORA", MiLoraConfig, MiLoraModel, prefix="lora_")

__all__ = ["MiLoraConfig", "MiLoraModel"]
