"""Runs lm-eval's tasks: the command `milora lm-eval`, and the model class `milora` in lm-eval's registry.

Importing `milora.evaluation.lm_eval.model` registers the class. This module does not import lm-eval, so the command
line can report a missing library.
"""

from milora.evaluation.lm_eval.harness import run, task_names

__all__ = ["run", "task_names"]
