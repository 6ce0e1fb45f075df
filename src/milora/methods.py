"""The paper's thirteen methods by name, at the paper's settings, and their parameter counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, get_peft_model
from torch import nn

from milora.backbone.blocks import OWN_ROUTER, find_blocks
from milora.backbone.shapes import from_config, shape_config
from milora.plugins import METHOD_GROUP, plugins
from milora.tuners.bitfit import BitFitConfig
from milora.tuners.ia3 import IA3ProjectedConfig
from milora.tuners.iapt import IAPTConfig
from milora.tuners.learned_adapter import LearnedAdapterConfig
from milora.tuners.milora import MiLoraConfig
from milora.tuners.moelora import MoeLoraConfig
from milora.tuners.parallel_adapter import ParallelAdapterConfig
from milora.tuners.ptuning_v2 import PTuningV2Config
from milora.tuners.ssp import SSPConfig
from milora_core.errors import MiLoraError, did_you_mean

RANK = 32
"""Rank of the LoRAs in every method with LoRAs (section 4.2 of Zhang et al. 2024)."""

ALLOCATION_INTERVAL = 10
"""Steps between AdaLoRA's allocations."""

MAGNITUDES = "lora_magnitude_vector"
"""DoRA's magnitudes, which the paper does not count for DoRA and MiDoRA."""

Values = dict[str, Any]
Inject = Callable[..., Any]
"""Adds a method's adapter to a model on the meta device; takes overrides of its configuration."""


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters of a method on a backbone.

    Attributes:
        tunable: Trained parameters, as the paper counts them.
        activated_mean: Active parameters per token, mean over inputs.
        activated_max: Active parameters per token, maximum.
    """

    tunable: int
    activated_mean: int
    activated_max: int


def block_linears(backbone: nn.Module) -> str:
    """A regular expression for PEFT's `target_modules`: the linear modules of the blocks, without the head."""
    blocks = find_blocks(backbone)
    path = re.escape(blocks[0].path.rpartition(".")[0])
    names = dict.fromkeys(re.escape(name) for block in blocks for name in block.linears)
    return rf"{path}\.\d+\.({'|'.join(names)})"


# ------------------------------------------------------------------------------ settings


def _defaults(backbone: nn.Module, overrides: Values) -> Values:
    return {}


def _midora(backbone: nn.Module, overrides: Values) -> Values:
    return {"use_dora": True}


def _lora(backbone: nn.Module, overrides: Values) -> Values:
    rank = overrides.get("r", RANK)
    return {"r": rank, "lora_alpha": 2 * rank, "target_modules": block_linears(backbone), "task_type": "CAUSAL_LM"}


def _dora(backbone: nn.Module, overrides: Values) -> Values:
    return {**_lora(backbone, overrides), "use_dora": True}


def _adalora(backbone: nn.Module, overrides: Values) -> Values:
    """Twice the rank initially, half of which is pruned; begin and end of the pruning are our choice."""
    total = overrides.get("total_step")
    if total is None:
        raise MiLoraError(
            "AdaLoRA prunes by a schedule over all optimiser steps: pass their number as total_step, for example "
            "config_for('adalora', backbone, total_step=1000)."
        )
    first = overrides.get("init_r", 2 * RANK)
    return {
        "init_r": first,
        "target_r": first // 2,
        # PEFT divides by the initial rank, also after pruning.
        "lora_alpha": 2 * first,
        "tinit": total // 10,
        "tfinal": 3 * total // 10,
        "deltaT": ALLOCATION_INTERVAL,
        "target_modules": block_linears(backbone),
        "task_type": "CAUSAL_LM",
    }


# ------------------------------------------------------------------------------ counting


def _trained(module: nn.Module, part: str = "") -> int:
    """The trainable parameters of a module without magnitudes; with `part` only those whose name contains it."""
    return sum(p.numel() for n, p in module.named_parameters() if p.requires_grad and part in n and MAGNITUDES not in n)


def _always_active(tunable: int) -> Counts:
    return Counts(tunable, tunable, tunable)


def _count(inject: Inject) -> Counts:
    return _always_active(_trained(inject()))


def _count_after_pruning(inject: Inject) -> Counts:
    model = inject()
    config = model.peft_config["default"]
    # Each rank of a module costs the same: a row of A, a column of B, a singular value.
    return _always_active(_trained(model) * config.target_r // config.init_r)


def _count_within_budget(inject: Inject) -> Counts:
    return _always_active(sum(inject().base_model.most_probable().values()))


def _count_mean_of_operations(inject: Inject) -> Counts:
    config = inject().peft_config["default"]
    counts = [_trained(inject(activations=config.activations[:1], operations=[name])) for name in config.operations]
    return _always_active(round(sum(counts) / len(counts)))


def _count_routed_by_prompt(inject: Inject) -> Counts:
    model = inject()
    top_k = model.peft_config["default"].top_k
    routers = _trained(model, OWN_ROUTER)
    mean, most = float(routers), routers
    for block in find_blocks(model.base_model.model):
        sizes = (_trained(linear) for linear in block.linears.values())
        experts = sorted((size for size in sizes if size > 0), reverse=True)
        if experts:
            most += sum(experts[:top_k])
            mean += sum(experts) * min(top_k / len(experts), 1)
    return Counts(_trained(model), round(mean), most)


def _count_routed_by_token(inject: Inject) -> Counts:
    model = inject()
    config = model.peft_config["default"]
    tunable, experts = _trained(model), _trained(model, ".lora_")
    active = tunable - experts + experts * config.top_k // config.num_experts
    return Counts(tunable, active, active)


# ------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Method:
    """One of the paper's methods.

    Attributes:
        title: Its name in the paper's tables.
        config_class: Its `PeftConfig`.
        settings: The paper's settings for a backbone and the caller's overrides; the defaults of our own configurations
            are the paper's settings.
        count: Counts its parameters.
        paper_tunable: Its tunable parameters on Llama-2 7B in the paper's Table 1; `None` for others' methods.
    """

    title: str
    config_class: type[Any]
    settings: Callable[[nn.Module, Values], Values] = _defaults
    count: Callable[[Inject], Counts] = _count
    paper_tunable: int | None = None


PAPER_BACKBONE = "llama-2-7b"
"""The shape of the paper's Table 1."""

METHODS: Mapping[str, Method] = {
    "parallel-adapter": Method("Parallel-Adapter", ParallelAdapterConfig, paper_tunable=83_900_000),
    "learned-adapter": Method(
        "Learned-Adapter", LearnedAdapterConfig, count=_count_mean_of_operations, paper_tunable=81_800_000
    ),
    "p-tuning-v2": Method("P-tuning v2", PTuningV2Config, paper_tunable=84_500_000),
    "iapt": Method("IAPT", IAPTConfig, paper_tunable=83_900_000),
    "bitfit": Method("BitFit", BitFitConfig, paper_tunable=87_000_000),
    "ia3": Method("(IA)3", IA3ProjectedConfig, paper_tunable=78_600_000),
    "ssp": Method("SSP", SSPConfig, count=_count_within_budget, paper_tunable=80_600_000),
    "lora": Method("LoRA", LoraConfig, _lora, paper_tunable=80_000_000),
    "adalora": Method("AdaLoRA", AdaLoraConfig, _adalora, _count_after_pruning, paper_tunable=80_000_000),
    "moelora": Method("MOELoRA", MoeLoraConfig, count=_count_routed_by_token, paper_tunable=87_300_000),
    "dora": Method("DoRA", LoraConfig, _dora, paper_tunable=80_000_000),
    "milora": Method("MiLoRA", MiLoraConfig, count=_count_routed_by_prompt, paper_tunable=80_900_000),
    "midora": Method("MiDoRA", MiLoraConfig, _midora, _count_routed_by_prompt, paper_tunable=80_900_000),
}
"""The methods by the names that configurations and commands use, in the order of the paper's Table 1."""


def method_names() -> list[str]:
    """The names of all methods: the paper's, then those of other distributions (entry points `milora.methods`).

    Raises:
        MiLoraError: If another distribution's method cannot be loaded.
    """
    return list({**METHODS, **plugins(METHOD_GROUP)})


def method(name: str) -> Method:
    """The method with this name.

    Raises:
        MiLoraError: If there is none (the message lists all names and the closest), or if another distribution's method
            cannot be loaded.
    """
    known: dict[str, Method] = {**plugins(METHOD_GROUP), **METHODS}
    if name not in known:
        names = method_names()
        raise MiLoraError(f"There is no method {name!r}; there are {', '.join(names)}{did_you_mean(name, names)}")
    return known[name]


def config_for(name: str, backbone: nn.Module, **overrides: Any) -> PeftConfig:
    """The configuration of a method at the paper's setting (section 4.2 and appendix of Zhang et al. 2024).

    Args:
        name: One of `METHODS`.
        backbone: The model for `get_peft_model`, or one with the same structure.
        **overrides: Overrides of the configuration's fields; AdaLoRA needs `total_step`.

    Raises:
        MiLoraError: If there is no such method or field, AdaLoRA has no `total_step`, or a value is refused.
    """
    found = method(name)
    known = [field.name for field in fields(found.config_class) if field.init]
    for field in overrides:
        if field not in known:
            raise MiLoraError(f"{found.config_class.__name__} has no field {field!r}{did_you_mean(field, known)}")
    return found.config_class(**{**found.settings(backbone, overrides), **overrides})


def parameter_counts(name: str, backbone: Any, **overrides: Any) -> Counts:
    """Counts the parameters of a method's adapter in a model without weights.

    Every trained parameter is tunable, with these exceptions:

    - the magnitudes of DoRA and MiDoRA are not counted, as in the paper;
    - AdaLoRA is counted after pruning, if every module keeps the mean rank;
    - SSP is counted for a structure that fits its budget;
    - Learned-Adapter is counted as the mean over the operations that its search can find.

    For most methods all tunable parameters are active. For MiLoRA and MiDoRA the active parameters are the routers,
    which serve every prompt, and the LoRAs of each block's k chosen modules: the mean over uniformly distributed
    choices, and the maximum with the k largest modules. (Of the paper's own figures on Llama-2 7B, 12.3M in Table 2 is
    this mean for k = 1, 16.4M "at most" is this maximum for k = 1, and 25.2M in Table 1 is three attention modules
    without routers.) For MOELoRA they are the routers and each module's chosen experts, which all have one size.

    Args:
        name: One of `METHODS`.
        backbone: A transformers configuration, or an argument of [`milora.backbone.shapes.shape_config`].
        **overrides: As for [`config_for`].

    Raises:
        MiLoraError: If there is no such method, field, or backbone.
    """
    found = method(name)
    config = shape_config(backbone) if isinstance(backbone, str) else backbone
    if found.config_class is AdaLoraConfig:
        overrides = {"total_step": 1000, **overrides}

    def inject(**values: Any) -> Any:
        model = from_config(config)
        adapter = config_for(name, model, **{**overrides, **values})
        # The adapter needs neither memory nor random numbers. PEFT's own switch alone would create and discard tensors.
        with torch.device("meta"):
            return get_peft_model(model, adapter, low_cpu_mem_usage=True)

    return found.count(inject)
