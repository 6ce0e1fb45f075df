"""Hands `task_ids` on to the tuner, for which PEFT has no way."""

from __future__ import annotations

import functools
from typing import Any

from peft import PeftModelForCausalLM


def hand_on_task_ids(tuner_class: type[Any]) -> None:
    """Makes `PeftModelForCausalLM`'s forward hand `task_ids` on; doing it again changes nothing.

    It has an argument of that name and drops it, unless the method is one of two of PEFT's own. Where the tuner is
    another class, nothing changes.

    Args:
        tuner_class: The tuner that has `use_tasks`.
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
