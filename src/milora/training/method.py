"""The method and its settings."""

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
"""Inherited fields that PEFT's configuration does not read, and the fields to use instead."""

ROUTER_NORM = "centered"
"""The default `router_norm` of training runs.

`tokens`, the default of [`MiLoraConfig`], is closer to the paper, but with it the routers of a real language model
hardly distinguish prompts at the start: pooled prompts differ little around one large vector (docs/results/smollm2).
"""


@dataclass
class MethodArguments:
    """One of the paper's thirteen methods, at the paper's settings unless overridden here.

    MiLoRA and MiDoRA train with [`ROUTER_NORM`] unless `router_norm` is given. `settings` has any fields of the
    method's PEFT configuration; the most used also have a flag, where `None` means the method's default.

    Raises:
        MiLoraError: If there is no such method, or a setting is not a field of its configuration, is given twice, or is
            not supported by [`milora.training.train`].
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
        default=None, metadata={"help": "Name endings of the adapted modules; by default the method's."}
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
                raise MiLoraError(f"{origin} is not used by {self.method}; set {instead!r} in settings.")
            if name not in names:
                raise MiLoraError(
                    f"{origin} is not a setting of {self.method}: its {method_of(self.method).config_class.__name__} "
                    f"has no field {name!r}{did_you_mean(name, names)}"
                )
        if self.method == "moelora" and self.overrides().get("gate") == "task":
            raise MiLoraError(
                "MOELoRA's gate='task' needs each row's task, which rows do not contain here: use gate='token', or "
                "your own training loop with task_ids."
            )

    @property
    def title(self) -> str:
        """The method's name in the paper's tables."""
        return method_of(self.method).title

    def overrides(self) -> dict[str, Any]:
        """The overridden fields of the configuration.

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
        """Builds the PEFT configuration of these arguments.

        Args:
            backbone: The adapter's backbone.
            steps: Optimiser steps of the training run, the length of AdaLoRA's schedule.

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
            raise MiLoraError(f"settings is not JSON ({error}); give a mapping such as '{{\"r\": 16}}'.") from error
    if not isinstance(settings, dict):
        raise MiLoraError(f"settings must be a mapping of field to value; found {settings!r}.")
    return settings
