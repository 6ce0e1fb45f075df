"""Generates with routes, and computes the routes of prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from milora.tuners.context import Generation, Scope, check_thread, entered, said
from milora.tuners.generate_options import (
    compiled_settings,
    is_compiled_by_transformers,
    needs_own_pass,
    one_token,
    prompts_given,
    size_given,
)
from milora.tuners.grouped import check_names
from milora.tuners.identity import BASE_ROW
from milora.tuners.milora.forward import MERGED, UNKNOWN_CACHE, RoutingHooks
from milora.tuners.milora.merging import merged_route
from milora.tuners.milora.routed import RoutedPrompts
from milora_core.errors import MiLoraError
from milora_core.routing import Route


def generate(
    hooks: RoutingHooks,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    route: Route | None,
    compiled: bool | None,
    merge_route: bool,
) -> Any:
    """See [`milora.tuners.milora.model.MiLoraModel.generate`]."""
    named = {**dict(zip(("inputs", "generation_config"), args, strict=False)), **kwargs}
    model: Any = hooks.backbone
    is_merged = merge_route or hooks.merged is not None
    if compiled and is_merged:
        raise MiLoraError(
            "Compiled steps do not support a merged route: leave out compiled=True, or merge_route=True and `with"
            " model.merged_route(...)`."
        )
    if compiled:
        kwargs |= compiled_settings(named)
    elif compiled is False or is_merged:
        kwargs["disable_compile"] = True
    check_thread(hooks.owner)
    if hooks.is_off():
        return model.generate(*args, **kwargs)
    names, size = said(hooks.owner, "adapter_names"), size_given(named)
    if names is not None:
        check_names(names, size[0], size[0])
        if merge_route:
            raise MiLoraError("Rows with different adapters have no common route to merge; leave out merge_route.")
    adapters = _adapters(hooks, names)
    if route is None and said(hooks.owner, "route") is None:
        cache = named.get("past_key_values")
        # The bare backbone may have filled it if all adapters leave the prompt to it; the prefill checks that.
        if cache is not None and cache.get_seq_length() > 0 and len(hooks.late(adapters)) < len(adapters):
            raise MiLoraError(UNKNOWN_CACHE)
        if needs_own_pass(model, named):
            route = compute_route(hooks, prompts_given(named))
    with ExitStack() as stack:
        generation = stack.enter_context(_generation(hooks, named.get("attention_mask"), size, names, route))
        if merge_route and hooks.merged is None:
            generation.merge_into = lambda route: stack.enter_context(
                merged_route(hooks, adapters[0], route, generation)
            )
        if compiled or is_compiled_by_transformers(model, {**named, **kwargs}):
            steps = hooks.owner.compiled(adapters, named_rows=names is not None, required=bool(compiled))
            if not stack.enter_context(steps):
                kwargs["disable_compile"] = True
        output = model.generate(*args, **kwargs)
        recorded = said(hooks.owner, "routes")
        if recorded is not None:
            assert isinstance(generation.prompts, RoutedPrompts)
            recorded.append(generation.prompts.route())
    return output


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
        _generation(hooks, inputs.get("attention_mask"), size_given(inputs), names, None) as generation,
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


def _adapters(hooks: RoutingHooks, names: tuple[str, ...] | None) -> list[str]:
    """The adapters of rows with these names, or the active one."""
    return list(hooks.tuner.active_adapters if names is None else set(names) - {BASE_ROW})


@contextmanager
def _generation(
    hooks: RoutingHooks,
    attended: Tensor | None,
    size: tuple[int, int],
    names: tuple[str, ...] | None,
    route: Route | None,
) -> Iterator[Generation]:
    use = hooks.owner.identities.begin(_adapters(hooks, names))
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
