"""The public functions for routes of a model: compute, force and record routes, and generate with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from milora.tuners.context import Generation, Scope, caller_scope, check_thread, entered, said
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
from milora.tuners.milora.forward import UNKNOWN_CACHE, RoutingHooks
from milora.tuners.milora.merging import merged_route
from milora.tuners.milora.routed import RoutedPrompts
from milora_core.errors import MiLoraError
from milora_core.routing import Route


class Routes:
    """The routes of one model, whose calls `hooks` handle."""

    def __init__(self, hooks: RoutingHooks) -> None:
        self.hooks = hooks
        self.owner = hooks.owner

    def generate(
        self,
        *args: Any,
        route: Route | None = None,
        compiled: bool | None = None,
        merge_route: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`generate` of the backbone, routed once: at the prefill, or by `route`.

        Assisted generation and chunked prefill, whose first pass is not the prompt, route in a pass of their own first.

        Args:
            *args: See the backbone's `generate`.
            route: A route to follow, with one row per prompt or one row for all; required to continue a cache that
                already holds tokens.
            compiled: Compile the decode step (static cache, `torch.compile`). Routes and adapters are inputs of the
                step, so other prompts and tenants do not compile again. `None` leaves it to transformers, which
                compiles on a GPU with `cache_implementation="static"`; `False` disables it.
            merge_route: If all rows have one route, merge it into the backbone's weights for this generation, after the
                prefill has computed it: decoding then costs the same as for the backbone. Until the end there is a
                second copy of the affected weights, and other requests are refused; see [`Routes.merged_route`].
            **kwargs: See the backbone's `generate`.

        Raises:
            MiLoraError: If the cache already holds tokens and no route is given, a row is fully masked, a prompt is
                empty, or an adapter is being deleted; with `merge_route` if rows differ, a chosen layer is quantised or
                another request is running; with `compiled=True` if steps cannot be compiled.
        """
        named = {**dict(zip(("inputs", "generation_config"), args, strict=False)), **kwargs}
        model: Any = self.hooks.backbone
        is_merged = merge_route or self.hooks.merged is not None
        if compiled and is_merged:
            raise MiLoraError(
                "Compiled steps do not support a merged route: leave out compiled=True, or merge_route=True and `with"
                " model.merged_route(...)`."
            )
        if compiled:
            kwargs |= compiled_settings(named)
        elif compiled is False or is_merged:
            kwargs["disable_compile"] = True
        check_thread(self.owner)
        if self.hooks.is_off():
            return model.generate(*args, **kwargs)
        names, size = said(self.owner, "adapter_names"), size_given(named)
        if names is not None:
            check_names(names, size[0], size[0])
            if merge_route:
                raise MiLoraError("Rows with different adapters have no common route to merge; leave out merge_route.")
        adapters = self._adapters(names)
        if route is None and said(self.owner, "route") is None:
            self._check_cache(named.get("past_key_values"), adapters)
            if needs_own_pass(model, named):
                route = self.route(**prompts_given(named))
        with ExitStack() as stack:
            generation = stack.enter_context(self._generation(named.get("attention_mask"), size, names, route))
            if merge_route and self.hooks.merged is None:
                generation.merge_into = lambda route: stack.enter_context(
                    merged_route(self.hooks, adapters[0], route, generation)
                )
            if compiled or is_compiled_by_transformers(model, {**named, **kwargs}):
                steps = self.owner.compiled(adapters, named_rows=names is not None, required=bool(compiled))
                if not stack.enter_context(steps):
                    kwargs["disable_compile"] = True
            output = model.generate(*args, **kwargs)
            recorded = said(self.owner, "routes")
            if recorded is not None:
                assert isinstance(generation.prompts, RoutedPrompts)
                recorded.append(generation.prompts.route())
        return output

    @torch.no_grad()
    def route(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> Route:
        """Computes the routes of prompts without generating.

        Args:
            input_ids: (batch, tokens).
            attention_mask: (batch, tokens).
            labels: (batch, tokens): if given, the prompt ends before the first label, as in training.
            adapter_names: An adapter for each row.
            **kwargs: Further arguments of the backbone, such as `inputs_embeds`.

        Returns:
            The [`Route`], a row for each prompt, on the backbone's device.

        Raises:
            MiLoraError: If the adapters are disabled, a prompt is empty or fully masked.
        """
        check_thread(self.owner)
        if self.hooks.is_off():
            raise MiLoraError("The adapters are disabled, so there are no routers.")
        model: Any = self.hooks.backbone
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        names = said(self.owner, "adapter_names") if adapter_names is None else self.check_names(adapter_names)
        with self._generation(attention_mask, size_given(inputs), names, None) as generation, evaluating(model):
            if labels is not None:
                model(**inputs, labels=labels)
            else:
                # The prefill of generate itself: some models derive positions from the mask there, but not in a plain
                # forward.
                model.generate(**inputs, generation_config=one_token(model))
            assert isinstance(generation.prompts, RoutedPrompts)
            return generation.prompts.route()

    def use_route(self, route: Route | None) -> AbstractContextManager[None]:
        """`with model.use_route(route):` makes passes and generations follow a route instead of the routers.

        The route has one row per prompt, or one row for all. `generate` repeats each row for its beams and return
        sequences. The context follows asyncio tasks and `asyncio.to_thread`. A plain thread started inside is refused,
        because it does not inherit the context: pass `route=` to its `generate`. `None` leaves the decision to the
        routers.
        """
        return caller_scope(Scope(self.owner, route=route))

    def use_prompt(self, prompt: Tensor) -> AbstractContextManager[None]:
        """`with model.use_prompt(mask):` marks the prompt's tokens, (batch, tokens), if there are no labels."""
        return caller_scope(Scope(self.owner, prompt=prompt))

    @contextmanager
    def record_routes(self) -> Iterator[list[Route]]:
        """`with model.record_routes() as routes:` collects the route of every finished `generate` inside.

        It is the route that the generation itself computed or followed, on the backbone's device, without extra
        computation. With beams or several return sequences a prompt has as many equal rows in succession as in the
        prefill.
        """
        routes: list[Route] = []
        with caller_scope(Scope(self.owner, routes=routes)):
            yield routes

    def merged_route(self, route: Route) -> AbstractContextManager[None]:
        """`with model.merged_route(route):` follows a route as `use_route` does, merged into the weights.

        Its experts then cost nothing per token. The affected weights are in memory twice until the end, when the
        backbone's own are restored bit for bit, also after an exception. Merged weights are rounded to the backbone's
        dtype, so in bfloat16 the outputs are close but not equal to those of `use_route`. Inside this context no other
        route or thread may use the model: such calls are refused.

        Raises:
            MiLoraError: If the route's rows differ or it is not of this adapter, the model is in training mode or its
                adapters are disabled, a chosen layer is quantised, offloaded or shares its weight, another request is
                running, or a route is already merged.
        """
        return merged_route(self.hooks, (self._adapters(None) or [""])[0], route, None)

    def check_names(self, names: list[str]) -> tuple[str, ...]:
        """The adapter of each row, checked.

        Raises:
            MiLoraError: If there is no such adapter, the model is in training mode, or a route is merged.
        """
        known = self.hooks.tuner.peft_config
        if self.hooks.backbone.training:
            raise MiLoraError("adapter_names is for inference; call model.eval() first.")
        if self.hooks.merged is not None:
            raise MiLoraError(
                "adapter_names gives rows their own adapters, but a route is merged into the backbone's weights, so "
                "no other route can be used; leave merged_route first."
            )
        if not names:
            raise MiLoraError("adapter_names is empty; it names an adapter for each row.")
        unknown = set(names) - {BASE_ROW, *known}
        if unknown:
            raise MiLoraError(f"No adapter named {sorted(unknown)}; there are {sorted(known)}.")
        return tuple(names)

    def _adapters(self, names: tuple[str, ...] | None) -> list[str]:
        """The adapters of rows with these names, or the active one."""
        return list(self.hooks.tuner.active_adapters if names is None else set(names) - {BASE_ROW})

    @contextmanager
    def _generation(
        self, attended: Tensor | None, size: tuple[int, int], names: tuple[str, ...] | None, route: Route | None
    ) -> Iterator[Generation]:
        use = self.owner.identities.begin(self._adapters(names))
        generation = Generation(attended, size, use)
        try:
            with entered(Scope(self.owner, route=route, adapter_names=names, generation=generation)):
                yield generation
        finally:
            self.owner.identities.end(use)

    def _check_cache(self, cache: Any, adapters: list[str]) -> None:
        """Refuses a filled cache of an unknown route, unless the backbone may have made it; the prefill checks that."""
        if cache is not None and cache.get_seq_length() > 0 and len(self.hooks.late(adapters)) < len(adapters):
            raise MiLoraError(UNKNOWN_CACHE)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside this context the model is in evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
