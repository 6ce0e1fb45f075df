"""Computes the routes of prompts, and checks the adapters that a caller names for the rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from milora.tuners.context import check_thread, generating, said
from milora.tuners.generate_options import one_token, size_given
from milora.tuners.grouped import checked_names
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
    is_training = model.training
    names = said(hooks.owner, "adapter_names") if adapter_names is None else check_row_names(hooks, adapter_names)
    try:
        adapters, attended = adapters_of(hooks, names), inputs.get("attention_mask")
        with generating(hooks.owner, adapters, attended, size_given(inputs), adapter_names=names) as generation:
            model.eval()
            if labels is not None:
                model(**inputs, labels=labels)
            else:
                # The prefill of generate itself: some models derive positions from the mask there, but not in a plain
                # forward.
                model.generate(**inputs, generation_config=one_token(model))
            assert isinstance(generation.prompts, RoutedPrompts)
            return generation.prompts.route()
    finally:
        model.train(is_training)


def check_row_names(hooks: RoutingHooks, names: list[str]) -> tuple[str, ...]:
    """See [`checked_names`]; also refused while a route is merged."""
    if hooks.merged is not None:
        raise MiLoraError(MERGED)
    return checked_names(names, hooks.tuner.peft_config, training=hooks.backbone.training)


def adapters_of(hooks: RoutingHooks, names: tuple[str, ...] | None) -> list[str]:
    """The adapters of rows with these names, or the active one."""
    return list(hooks.tuner.active_adapters if names is None else set(names) - {BASE_ROW})
