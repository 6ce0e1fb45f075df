"""Begins generations, and computes the routes of prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from milora.tuners.context import Generation, Scope, check_thread, entered, said
from milora.tuners.generate_options import (
    one_token,
    size_given,
)
from milora.tuners.identity import BASE_ROW
from milora.tuners.milora.forward import MERGED, RoutingHooks
from milora.tuners.milora.routed import RoutedPrompts
from milora_core.errors import MiLoraError
from milora_core.routing import Route


@torch.no_grad()
def compute_route(
    hooks: RoutingHooks, inputs: dict[str, Any], labels: Tensor | None = None, adapter_names: list[str] | None = None
) -> Route:
    """See [`milora.tuners.milora.model.MiLoraModel.route`]; `inputs` are the backbone's."""
    check_thread(hooks.owner)
    if hooks.is_off():
        raise MiLoraError("The adapters are disabled, so there are no routers.")
    model: Any = hooks.backbone
    names = said(hooks.owner, "adapter_names") if adapter_names is None else check_row_names(hooks, adapter_names)
    with (
        running_generation(hooks, inputs.get("attention_mask"), size_given(inputs), names, None) as generation,
        _evaluating(model),
    ):
        if labels is not None:
            model(**inputs, labels=labels)
        else:
            # The prefill of generate itself: some models derive positions from the mask there, but not in a plain
            # forward.
            model.generate(**inputs, generation_config=one_token(model))
        assert isinstance(generation.prompts, RoutedPrompts)
        return generation.prompts.route()


def check_row_names(hooks: RoutingHooks, names: list[str]) -> tuple[str, ...]:
    """The adapter of each row.

    Raises:
        MiLoraError: If there is no such adapter, the model is in training mode, or a route is merged.
    """
    known = hooks.tuner.peft_config
    if hooks.backbone.training:
        raise MiLoraError("adapter_names is for inference; call model.eval() first.")
    if hooks.merged is not None:
        raise MiLoraError(MERGED)
    if not names:
        raise MiLoraError("adapter_names is empty; it names an adapter for each row.")
    unknown = set(names) - {BASE_ROW, *known}
    if unknown:
        raise MiLoraError(f"No adapter named {sorted(unknown)}; there are {sorted(known)}.")
    return tuple(names)


def adapters_of(hooks: RoutingHooks, names: tuple[str, ...] | None) -> list[str]:
    """The adapters of rows with these names, or the active one."""
    return list(hooks.tuner.active_adapters if names is None else set(names) - {BASE_ROW})


@contextmanager
def running_generation(
    hooks: RoutingHooks,
    attended: Tensor | None,
    size: tuple[int, int],
    names: tuple[str, ...] | None,
    route: Route | None,
) -> Iterator[Generation]:
    """Inside this context a generation of `size` (prompts, tokens) runs, with the caller's mask `attended`."""
    use = hooks.owner.identities.begin(adapters_of(hooks, names))
    generation = Generation(attended, size, use)
    try:
        with entered(Scope(hooks.owner, route=route, adapter_names=names, generation=generation)):
            yield generation
    finally:
        hooks.owner.identities.end(use)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside this context the model is in evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
