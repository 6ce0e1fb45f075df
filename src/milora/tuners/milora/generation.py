"""`generate` of a MiLoRA model, and the routes of its prompts: asked for, given, and recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from milora.tuners.grouped.compiling import compiled_settings, is_compiled_by_transformers
from milora.tuners.milora.merging import MergingTuner
from milora.tuners.milora.named_rows import RoutedServing
from milora.tuners.milora.routers import routers_of
from milora.tuners.milora.routing_pass import RoutingPass
from milora.tuners.prompt_pass import needs_own_pass, one_token
from milora_core.errors import MiLoraError
from milora_core.routing import Route


class GeneratingTuner(MergingTuner):
    """What callers do with a tuner whose prompts are routed.

    The tuner sets `grouped` before its first adapter is in place.
    """

    grouped: RoutedServing
    eval: Callable[[], Any]
    train: Callable[[bool], Any]
    # PEFT's, which puts `adapter_names` in force.
    _enable_peft_forward_hooks: Callable[..., AbstractContextManager[None]]

    def generate(
        self,
        *args: Any,
        route: Route | None = None,
        compiled: bool | None = None,
        merge_route: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`generate` of the backbone, routed once: at the prefill, or by `route`.

        Assisted generation and chunked prefill, whose first pass is not the prompt, route in a pass of its own first.

        Args:
            *args: As for the backbone's `generate`.
            route: A route to follow, a row for each prompt; needed to continue a cache that already holds tokens.
            compiled: Compile the decode step (static cache, `torch.compile`): routes and adapters are data that it
                reads, so that other prompts and tenants compile nothing anew. `None` leaves it to transformers, which
                compiles on a GPU with `cache_implementation="static"`; `False` rules it out.
            merge_route: Where all rows have one route, merge it into the backbone's weights for the length of the
                generation, after the prefill has found it: decoding then costs what the backbone costs. There is a
                second copy of the affected weights for as long, and no other thread may use the backbone; see
                [`MiLoraModel.merged_route`].
            **kwargs: As for the backbone's `generate`.

        Raises:
            MiLoraError: If the cache already holds tokens and no route is given, a row is fully masked, or a prompt is
                empty, or `merge_route` is asked for and rows differ, a chosen layer is quantised, another thread is
                generating, or the steps are to be compiled.
        """
        model: Any = self.model
        named = {**dict(zip(("inputs", "generation_config"), args, strict=False)), **kwargs}
        is_merged = merge_route or self.dispatcher.merged is not None
        if compiled and is_merged:
            raise MiLoraError(
                "A merged route is not served by compiled steps: leave out compiled=True, or merge_route=True and "
                "`with model.merged_route(...)`."
            )
        if compiled:
            kwargs |= compiled_settings(named)
        elif compiled is False or is_merged:
            kwargs["disable_compile"] = True
        if self.prompt_tuning_is_off():
            return model.generate(*args, **kwargs)
        is_left_to_transformers = not compiled and is_compiled_by_transformers(model, {**named, **kwargs})
        cache = named.get("past_key_values")
        route = route if route is not None else self.dispatcher.forced
        if route is None and cache is not None and cache.get_seq_length() > 0:
            raise MiLoraError(
                "generate was given a cache that already holds tokens: a later turn can be served by the route of the "
                "first or by one of its own, and that is yours to say. Pass route=, for example the one that "
                "model.route(**inputs) returned for the prompt that filled the cache."
            )
        if route is None and needs_own_pass(self.model, named):
            prompts = {name: named.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask")}
            if named.get("inputs") is not None:
                prompts["input_ids"] = named["inputs"]
            route = self.route(**prompts)
        with (
            self.dispatcher.generating(named.get("attention_mask")) as generation,
            self.dispatcher.forcing(route),
            self._steps(compiled, is_left_to_transformers) as are_compiled,
            self._shared_weights.generating(),
            self._merging_when_known() if merge_route else nullcontext(),
        ):
            if is_left_to_transformers and not are_compiled:
                kwargs["disable_compile"] = True
            output = model.generate(*args, **kwargs)
        if self.dispatcher.records is not None:
            assert isinstance(generation.prompt_pass, RoutingPass)
            self.dispatcher.records.append(generation.prompt_pass.route(tuple(routers_of(self.model))))
        return output

    @contextmanager
    def _steps(self, compiled: bool | None, is_left_to_transformers: bool) -> Iterator[bool]:
        """In force: compiled steps, where the caller asked for them, or transformers and nothing is against it."""
        if compiled:
            with self.grouped.compiled():
                yield True
        elif is_left_to_transformers:
            names = self.dispatcher.adapter_names
            with self.grouped.compiled_if_possible(self.active_adapters if names is None else names) as are_compiled:
                yield are_compiled
        else:
            yield False

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
        """What the routers decide for some prompts, without generating anything.

        Args:
            input_ids: (batch, tokens).
            attention_mask: (batch, tokens).
            labels: (batch, tokens): the prompt is then what precedes the first label, as in training.
            adapter_names: An adapter for each row.
            **kwargs: Further arguments of the backbone, such as `inputs_embeds`.

        Returns:
            The [`Route`], a row for each prompt, on the backbone's device.

        Raises:
            MiLoraError: If the adapters are disabled, a prompt is empty or fully masked.
        """
        if self.prompt_tuning_is_off():
            raise MiLoraError("The adapters are disabled, so there are no routers to ask.")
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if adapter_names is not None:
            with self._enable_peft_forward_hooks(adapter_names=adapter_names):
                return self.route(labels=labels, **inputs)
        model: Any = self.model
        training = self.training
        self.eval()
        try:
            with self.dispatcher.generating(attention_mask) as generation:
                if labels is not None:
                    model(**inputs, labels=labels)
                else:
                    # The prefill of generate itself: some models derive positions from the mask there, and not in a
                    # plain forward.
                    model.generate(**inputs, generation_config=one_token(model))
                assert isinstance(generation.prompt_pass, RoutingPass)
                return generation.prompt_pass.route(tuple(routers_of(self.model)))
        finally:
            self.train(training)

    def use_route(self, route: Route) -> AbstractContextManager[None]:
        """`with model.use_route(route):` makes passes and generations follow a route; the routers are not asked.

        A batch of a multiple of the route's rows (beams, several return sequences) repeats each row in succession.
        """
        return self.dispatcher.forcing(route)

    def record_routes(self) -> AbstractContextManager[list[Route]]:
        """`with model.record_routes() as routes:` gets the route of every `generate` inside, once it has ended.

        It is the decision that the generation itself made, or followed, on the backbone's device; nothing is computed
        for it. With beams or several return sequences a prompt has as many equal rows in succession as the prefill had.
        """
        return self.dispatcher.recording()
