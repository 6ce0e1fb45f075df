"""Passes `task_ids` to the tuner, which PEFT does not do."""

from __future__ import annotations

import functools
from typing import Any

from peft import PeftModelForCausalLM


def hand_on_task_ids(tuner_class: type[Any]) -> None:
    """Makes the forward of `PeftModelForCausalLM` pass `task_ids` to tuners of this class, which have `use_tasks`.

    PEFT's forward drops this argument except for two of PEFT's own methods. Calling this again changes nothing.
    """
    original = PeftModelForCausalLM.forward
    if getattr(original, "hands_on_task_ids", False):
        return

    @functools.wraps(original)
    def forward(self: Any, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        if task_ids is None or not isinstance(self.base_model, tuner_class):
            return original(self, *args, task_ids=task_ids, **kwargs)
        with self.base_model.use_tasks(task_ids):
            return original(self, *args, **kwargs)

    forward.hands_on_task_ids = True  # type: ignore[attr-defined]
    PeftModelForCausalLM.forward = forward
