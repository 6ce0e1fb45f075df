"""The callbacks that a method needs, and early stopping, which depends on them."""

from __future__ import annotations

from typing import Any

from peft import AdaLoraModel
from transformers import TrainerCallback

from milora.training.adalora import AdaLoraAllocation
from milora.training.arguments import TrainingArguments
from milora.training.callbacks import DenseStart
from milora.training.learned_adapter_search import LearnedAdapterSearch
from milora.training.ssp_search import SSPSearch
from milora.training.stopping import EarlyStopping
from milora.tuners.learned_adapter import LearnedAdapterModel
from milora.tuners.milora import MiLoraModel
from milora.tuners.ssp import SSPModel
from milora_core.errors import MiLoraError


def method_callbacks(model: Any, arguments: TrainingArguments, *, has_dev: bool) -> list[TrainerCallback]:
    """The callbacks for a model with an adapter of any of the thirteen methods, under a [`MiLoraTrainer`].

    Args:
        model: A model that `get_peft_model` returned.
        arguments: The training arguments; reads `dense_share`, `search_share` and `early_stopping_patience`.
        has_dev: Whether there are dev rows for searches and early stopping.

    Raises:
        MiLoraError: If the method searches on dev rows and there are none, or it has no experts for `dense_share`.
    """
    tuner = model.base_model
    open_structures: list[Any] = []
    if isinstance(tuner, AdaLoraModel):
        open_structures.append(AdaLoraAllocation())
    elif isinstance(tuner, SSPModel | LearnedAdapterModel):
        # Also after its search, for runs that resume then.
        if tuner.is_searching and not has_dev:
            raise MiLoraError(
                f"{tuner.method} searches for its structure on dev rows, but there are none: pass --dev_data, or raise"
                " --dev_fraction."
            )
        search = SSPSearch if isinstance(tuner, SSPModel) else LearnedAdapterSearch
        open_structures.append(search(search_share=arguments.search_share))
    if arguments.dense_share > 0:
        if not isinstance(tuner, MiLoraModel):
            raise MiLoraError(
                f"--dense_share {arguments.dense_share} needs a method with routers and experts, milora or midora."
            )
        open_structures.append(DenseStart(arguments.dense_share))
    patience = arguments.early_stopping_patience
    stops = patience > 0 and has_dev and arguments.eval_strategy != "no"
    return [*open_structures, EarlyStopping(patience, open_structures)] if stops else open_structures
