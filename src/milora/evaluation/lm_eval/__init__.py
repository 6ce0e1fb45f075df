"""lm-eval's tasks on our models: `milora lm-eval`, and the model class `milora` in lm-eval's registry.

Importing `milora.evaluation.lm_eval.model` registers the class; this module imports nothing of lm-eval, so that the
command line starts fast and can say what is missing.
"""

from milora.evaluation.lm_eval.harness import run

__all__ = ["run"]
