"""lm-eval's tasks on our models: `milora lm-eval`, and the model class `milora` in lm-eval's registry.

Importing `milora.evaluation.lm_eval.model` registers the class. This module imports nothing of lm-eval, so the command
line can name what is missing.
"""

from milora.evaluation.lm_eval.harness import run, task_names

__all__ = ["run", "task_names"]
