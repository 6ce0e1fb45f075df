"""The measured methods. Each has its own modules and shares the backbone's weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import get_peft_model
from peft.helpers import DoraCaching

from milora.backbone.blocks import OWN_ROUTER, find_blocks
from milora.backbone.shapes import build
from milora.benchmark.settings import Settings
from milora.benchmark.sharing import shared_copy
from milora.inference.together import serve_together
from milora.methods import config_for, method_names
from milora_core.errors import MiLoraError, did_you_mean
from milora_core.routing import RouterProjection

BASE = "base"
"""The name of the frozen backbone without adapters."""

_STEPS = {"adalora": {"total_step": 1000}}
"""Fields that a configuration requires but inference does not use."""


@dataclass(frozen=True)
class Variant:
    """How to build a measured method.

    Attributes:
        method: Its name in `milora.methods`; `None` for the bare backbone.
        overrides: Fields of its configuration.
        dora_caching: Whether PEFT's DoRA caching is enabled during runs.
        merged: Whether the adapter is merged into (a copy of) the weights.
        together: Whether `serve_together` is called on the model.
        merges_route: Whether each generation merges one route. All rows of a batch must then have this route.
        bilevel: Whether each training step is followed by a step of Theta, the rational activations, on dev rows.
        generate: Further arguments of `generate`.
    """

    method: str | None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    dora_caching: bool = False
    merged: bool = False
    together: bool = False
    merges_route: bool = False
    bilevel: bool = False
    generate: Mapping[str, Any] = field(default_factory=dict)


VARIANTS: Mapping[str, Variant] = {
    BASE: Variant(None),
    "lora": Variant("lora"),
    "lora-merged": Variant("lora", merged=True),
    "lora-together": Variant("lora", together=True),
    "lora-qvd": Variant("lora", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "dora": Variant("dora"),
    "dora-cached": Variant("dora", dora_caching=True),
    "moelora": Variant("moelora"),
    "milora-k1": Variant("milora", {"top_k": 1}),
    "milora-k2": Variant("milora", {"top_k": 2}),
    "milora": Variant("milora"),
    "milora-qvod": Variant("milora", {"target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]}),
    "milora-merged": Variant("milora", merges_route=True, generate={"merge_route": True}),
    "milora-bilevel": Variant("milora", bilevel=True),
    "midora": Variant("midora"),
}
"""By name. Further ones: every other method of `milora.methods`, and `milora-k4` or `midora-k1` for any k."""


def variant(name: str) -> Variant:
    """The variant with this name.

    Raises:
        MiLoraError: If there is none. The message lists the names and suggests a similar one.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    if name in method_names():
        return Variant(name, _STEPS.get(name, {}))
    routed = re.fullmatch(r"(milora|midora)-k([1-9]\d*)", name)
    if routed:
        return Variant(routed[1], {"top_k": int(routed[2])})
    known = [*VARIANTS, *(method for method in method_names() if method not in VARIANTS)]
    raise MiLoraError(
        f"There is no method {name!r}; there are {', '.join(known)}, milora-k4 and so on{did_you_mean(name, known)}"
    )


def check_names(names: Sequence[str], *, training: bool = False) -> None:
    """Checks names of methods before a backbone is built.

    Args:
        names: Names of methods.
        training: Whether training steps are measured.

    Raises:
        MiLoraError: If there are no names, or a name is unknown, repeated, or differs from another only in training.
    """
    if not names:
        raise MiLoraError(f"No method is given; give some of {', '.join(VARIANTS)}.")
    for name in names:
        if variant(name).bilevel and not training:
            raise MiLoraError(f"{name} is a training step, which milora bench train measures: name milora here.")
        if names.count(name) > 1:
            raise MiLoraError(f"The method {name!r} is given twice.")


@dataclass(frozen=True)
class MeasuredMethod:
    """A method that is ready to run.

    Attributes:
        name: The name in results.
        variant: The variant it was built from.
        model: The bare backbone for `base`, a plain model for a merged adapter, otherwise a `PeftModel`.
        own_weights: Bytes of backbone weights that it copies only because methods share a process.
    """

    name: str
    variant: Variant
    model: Any
    own_weights: int = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context for its runs, with PEFT's DoRA caching on or off."""
        with DoraCaching(enabled=self.variant.dora_caching):
            yield


def build_backbone(settings: Settings) -> Any:
    """The backbone with random weights, without an end-of-sequence token."""
    assert settings.backbone is not None
    assert settings.device is not None
    fields: dict[str, Any] = {} if settings.layers is None else {"num_hidden_layers": settings.layers}
    if settings.attention is not None:
        fields["_attn_implementation"] = settings.attention
    torch.manual_seed(settings.seed)
    model = build(settings.backbone, settings.device, settings.torch_dtype, **fields)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.requires_grad_(False)


def build_method(
    name: str, backbone: Any, settings: Settings, adapters: Sequence[str] = ("default",)
) -> MeasuredMethod:
    """A method on the backbone's weights, in eval mode, with random values in all adapter tensors.

    Args:
        name: See [`variant`].
        backbone: The model from [`build_backbone`]. It is not changed.
        settings: The benchmark's settings.
        adapters: Names of the adapters. Each gets different random values.

    Raises:
        MiLoraError: If there is no such method.
    """
    found = variant(name)
    if found.method is None:
        return MeasuredMethod(name, found, backbone)
    linears = [linear for block in find_blocks(backbone) for linear in block.linears.values()] if found.merged else []
    own = sum(parameter.nbytes for linear in linears for parameter in linear.parameters())
    torch.manual_seed(settings.seed)
    inner = shared_copy(backbone, linears)
    frozen = {id(parameter) for parameter in inner.parameters()}
    model = None
    for adapter in adapters:
        config = config_for(found.method, inner, **found.overrides)
        floating = settings.adapter_dtype == "float32"
        if model is None:
            model = get_peft_model(inner, config, adapter_name=adapter, autocast_adapter_dtype=floating)
        else:
            model.add_adapter(adapter, config, autocast_adapter_dtype=floating)
    randomize(model, frozen)
    cast(model, frozen, torch.float32 if settings.adapter_dtype == "float32" else settings.torch_dtype)
    if found.together:
        serve_together(model)
    if found.merged:
        model = model.merge_and_unload()  # type: ignore[union-attr]
    return MeasuredMethod(name, found, model.eval(), own)  # type: ignore[union-attr]


@torch.no_grad()
def randomize(model: Any, frozen: set[int]) -> None:
    """Gives an adapter values as after training: no tensor is zero, and routers choose different experts per prompt.

    Args:
        model: A `PeftModel`.
        frozen: Identities of the backbone's parameters.
    """
    for module in model.modules():
        if isinstance(module, RouterProjection):
            # Pooled hidden states of random backbones are small. With these values their direction decides the choice.
            for parameter in module.parameters():
                parameter.normal_()
    for parameter in model.parameters():
        if id(parameter) not in frozen and not parameter.any():
            parameter.normal_(std=0.1)


def with_generate_arguments(method: MeasuredMethod, **arguments: Any) -> MeasuredMethod:
    """The method with further arguments for `generate`."""
    return replace(method, variant=replace(method.variant, generate={**method.variant.generate, **arguments}))


def cast(model: Any, frozen: set[int], dtype: torch.dtype) -> None:
    """Casts an adapter, except its routers, to one dtype, because methods differ in their default dtype.

    Args:
        model: A `PeftModel`.
        frozen: Identities of the backbone's parameters.
        dtype: The adapter's dtype.
    """
    routers = {id(p) for name, module in model.named_modules() if _is_router(name, module) for p in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in frozen | routers:
            parameter.data = parameter.data.to(dtype)


def _is_router(name: str, module: Any) -> bool:
    return isinstance(module, RouterProjection) or name.endswith(OWN_ROUTER)
