"""Which method learns, with which settings."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any

from peft import AdaLoraConfig, PeftConfig
from torch import nn

from milora.methods import config_for, method_names
from milora.methods import method as method_of
from milora.training.ranges import METHOD, check_ranges
from milora.tuners.milora import MiLoraConfig
from milora_core.errors import MiLoraError, did_you_mean

IGNORED_FIELDS: dict[str, dict[str, str]] = {"adalora": {"r": "init_r"}}
"""Fields that PEFT's configuration inherits and does not read, with those that it reads in their place."""

ROUTER_NORM = "centered"
"""The `router_norm` of training runs that name none.

`tokens`, the default of [`MiLoraConfig`], is closer to the paper, but leaves the routers of a real language model
almost blind at the start: pooled prompts differ little around one large vector (docs/results/smollm2).
"""


@dataclass
class MethodArguments:
    """One of the paper's thirteen methods, at the paper's settings but for what is said here.

    MiLoRA and MiDoRA train with [`ROUTER_NORM`] unless `router_norm` is given. `settings` has any fields of the
    method's PEFT configuration; the most used have a flag of their own, `None` where the method's default holds.

    Raises:
        MiLoraError: If there is no such method, a setting is no field of its configuration, is given twice, or cannot
            be trained by [`milora.training.train`].
    """

    method: str = field(default="milora", metadata={"help": f"One of {', '.join(method_names())}."})
    settings: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Any fields of the method's PEFT configuration: a mapping in YAML, JSON on the command line."
        },
    )
    r: int | None = field(default=None, metadata={"help": "Rank of each LoRA."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Outputs are scaled by this / r; default 2 r."})
    lora_dropout: float | None = field(default=None, metadata={"help": "Dropout on the LoRAs' inputs."})
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Name endings of what is adapted; by default what the method adapts."}
    )
    use_dora: bool | None = field(default=None, metadata={"help": "MiDoRA: experts are DoRAs."})
    top_k: int | None = field(default=None, metadata={"help": "How many experts of a block serve a prompt; default 3."})
    pooler: str | None = field(default=None, metadata={"help": "attention (default), mean, max or last."})
    router_activation: list[str] | None = field(
        default=None,
        metadata={
            "help": "rational (default), or gelu, relu, silu, tanh, identity; one, one for each block, or for equal "
            "parts of the blocks from the lowest, as in 'relu|gelu'."
        },
    )
    gate: str | None = field(default=None, metadata={"help": "hard (default), softmax or renormalized."})
    load_balancing_coef: float | None = field(
        default=None, metadata={"help": "Coefficient of the load-balancing loss (default 0.01)."}
    )
    router_norm: str | None = field(
        default=None, metadata={"help": "What the router normalizes: centered (default), tokens, pooled or none."}
    )

    def __post_init__(self) -> None:
        self.settings = _mapping(self.settings)
        names = [one.name for one in fields(method_of(self.method).config_class) if one.init]
        check_ranges(self.overrides(), METHOD)
        for name in self.overrides():
            origin = f"--{name}" if name not in self.settings else f"The setting {name!r}"
            instead = IGNORED_FIELDS.get(self.method, {}).get(name)
            if instead is not None:
                raise MiLoraError(f"{origin} is nothing that {self.method} reads; set {instead!r} in settings.")
            if name not in names:
                raise MiLoraError(
                    f"{origin} is no setting of {self.method}, whose {method_of(self.method).config_class.__name__} "
                    f"has no field {name!r}{did_you_mean(name, names)}"
                )
        if self.method == "moelora" and self.overrides().get("gate") == "task":
            raise MiLoraError(
                "MOELoRA's gate='task' needs to know each row's task in training and in generation, which rows do not "
                "say here: train gate='token', or call the model with task_ids in a loop of your own."
            )

    @property
    def title(self) -> str:
        """The method's name in the paper's tables."""
        return method_of(self.method).title

    def overrides(self) -> dict[str, Any]:
        """The fields of the configuration that are set other than by default.

        Raises:
            MiLoraError: If one is given twice, with different values.
        """
        settings = _mapping(self.settings)
        flags = {
            one.name: getattr(self, one.name)
            for one in fields(self)
            if one.name not in ("method", "settings") and getattr(self, one.name) is not None
        }
        activations = flags.get("router_activation")
        if isinstance(activations, list) and len(activations) == 1:
            flags["router_activation"] = activations[0]
        for name in flags.keys() & settings.keys():
            if flags[name] != settings[name]:
                raise MiLoraError(f"{name} is given twice: {flags[name]!r}, and {settings[name]!r} in settings.")
        return {**flags, **settings}

    def to_config(self, backbone: nn.Module, steps: int) -> PeftConfig:
        """The PEFT configuration that these arguments describe.

        Args:
            backbone: What the adapter is for.
            steps: Optimiser steps of the training run, which AdaLoRA's schedule is over.

        Raises:
            MiLoraError: If a value is refused.
        """
        overrides = self.overrides()
        if method_of(self.method).config_class is AdaLoraConfig:
            overrides = {"total_step": steps, **overrides}
        if method_of(self.method).config_class is MiLoraConfig:
            overrides = {"router_norm": ROUTER_NORM, **overrides}
        try:
            return config_for(self.method, backbone, **overrides)
        except MiLoraError:
            raise
        except (ValueError, TypeError) as error:
            raise MiLoraError(f"The settings of {self.method} are refused: {str(error).splitlines()[0]}") from error


def _mapping(settings: dict[str, Any] | str | None) -> dict[str, Any]:
    if settings is None or settings == "":
        return {}
    if isinstance(settings, str):
        try:
            settings = json.loads(settings)
        except json.JSONDecodeError as error:
            raise MiLoraError(f"settings is no JSON ({error}); give a mapping such as '{{\"r\": 16}}'.") from error
    if not isinstance(settings, dict):
        raise MiLoraError(f"settings must be a mapping of field to value; found {settings!r}.")
    return settings
