"""PEFT's tuner inside the model that a trainer gives to its callbacks."""

from __future__ import annotations

from typing import Any


def tuner_of(model: Any) -> Any:
    """The PEFT tuner around the backbone, also inside the wrapper for several processes; `None` if there is none."""
    return getattr(getattr(model, "module", model), "base_model", None)


def reads_prompts(tuner: Any) -> bool:
    """Whether a method reads the prompt, as MiLoRA and IAPT do, and so must know where it ends."""
    return getattr(tuner, "use_prompt", None) is not None
