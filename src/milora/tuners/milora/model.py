"""`MiLoraModel`: PEFT's LoRA model with a router in each block, which runs once per prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from accelerate import init_empty_weights
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from milora.tuners.caches import is_filled
from milora.tuners.context import Scope, caller_scope, check_thread, entered, generating, said
from milora.tuners.continuous_batching import NoContinuousBatching
from milora.tuners.generate_options import (
    compiled_settings,
    inputs_given,
    is_compiled_by_transformers,
    needs_own_pass,
    size_given,
)
from milora.tuners.grouped import GroupedOwner
from milora.tuners.grouped.wrappers import PlannedWrapper
from milora.tuners.milora.config import MiLoraConfig
from milora.tuners.milora.expert import NO_MERGE, ExpertLayer
from milora.tuners.milora.forward import MERGED, UNKNOWN_CACHE, RoutingHooks
from milora.tuners.milora.merging import merged_route
from milora.tuners.milora.routed import Place, RoutedPrompts
from milora.tuners.milora.router import RouterLayer, add_routers, remove_routers, routers_of
from milora.tuners.milora.routes import adapters_of, check_row_names, compute_route
from milora.tuners.milora.statistics import RoutingStatistics
from milora.tuners.milora.targets import fill_in_experts
from milora.tuners.plan import plan_module
from milora.tuners.rollback import RevertibleTuner
from milora_core.errors import MiLoraError
from milora_core.routing import Route


class MiLoraModel(NoContinuousBatching, RevertibleTuner, LoraModel):  # type: ignore[misc]
    """A backbone with MiLoRA adapters, created by `get_peft_model(model, MiLoraConfig())`.

    Each block gets a router (`milora_router`), and each adapted module stays a LoRA layer of PEFT. A forward pass reads
    the prompt from its arguments, each block's router routes it from the block's input, and the chosen modules serve
    the prompt and, with `generate` or the cache, every later token (Zhang et al. 2024, section 3).

    Attributes:
        owner: Owns the contexts of forward passes and the stacks of many tenants.
        hooks: Handles calls of the backbone.
    """

    tuner_layer_cls = (LoraLayer, RouterLayer)
    uses_shared_state = True
    active_adapter: str | list[str]
    owner: GroupedOwner

    def _pre_injection_hook(self, model: nn.Module, config: MiLoraConfig, adapter_name: str) -> None:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise MiLoraError(f"{type(model).__name__} is an encoder-decoder; MiLoRA routes decoder-only models.")
        self.owner = GroupedOwner(model)
        self.hooks = RoutingHooks(model, self.owner, self)

    def complete_adapter(self, adapter_name: str, config: MiLoraConfig, *args: Any, **kwargs: Any) -> None:
        """Gives every block with experts its router."""
        low_memory = bool(kwargs.get("low_cpu_mem_usage", False))
        with init_empty_weights() if low_memory else nullcontext():
            add_routers(self.model, adapter_name, config, self.owner)
        self.hooks.routers = routers_of(self.model)
        for router in self.hooks.routers.values():
            router.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        for module in self.model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                plan_module(module, PlannedWrapper, self.owner)
        self.hooks.watch()

    def _prepare_adapter_config(self, peft_config: MiLoraConfig, model_config: dict[str, Any]) -> MiLoraConfig:
        fill_in_experts(peft_config, self.model)
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: MiLoraConfig, key: str) -> Any:
        if key in peft_config.expert_places:
            return True
        # PEFT marks an excluded module with its own false value, and warns if there is none.
        return check_target_module_exists(peft_config, key) and False

    def _create_and_replace(
        self, config: Any, adapter_name: str, target: Any, name: str, parent: Any, current_key: str, **kwargs: Any
    ) -> None:
        super()._create_and_replace(config, adapter_name, target, name, parent, current_key, **kwargs)
        layer = getattr(parent, name)
        plan_module(layer, ExpertLayer, self.owner)
        layer.__dict__.setdefault("expert_places", {})[adapter_name] = Place(*config.expert_places[current_key])

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Like PEFT's, for one adapter at a time.

        Raises:
            MiLoraError: For several adapters, because one adapter routes a prompt (`adapter_names` gives each row its
                own); for another adapter than the active one while a route is merged.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) > 1:
            raise MiLoraError(
                f"Only one MiLoRA adapter can be active; found {names}. To serve several in one batch, "
                "give each row its own: model.generate(..., adapter_names=[...])."
            )
        if self.hooks.merged is not None and names != self.active_adapters:
            raise MiLoraError(f"{names} cannot be made active. {MERGED}")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Like PEFT's, including routers. It waits for the generations that use the adapter.

        Raises:
            MiLoraError: If it is called inside such a generation, or the generation does not end within a minute.
        """
        with self.changing_adapter(adapter_name):
            super().delete_adapter(adapter_name)
            for module in self.model.modules():
                if isinstance(module, LoraLayer):
                    module.__dict__.get("expert_places", {}).pop(adapter_name, None)
            # PEFT skips modules whose path contains the prefix "lora_", which "milora_router" does.
            for router in routers_of(self.model).values():
                router.delete_adapter(adapter_name)
                router.set_adapter(self.active_adapters)
            remove_routers(self.model, empty_only=True)
            self.hooks.routers = routers_of(self.model)

    def unload(self) -> nn.Module:
        """The bare backbone, without LoRA layers, routers or hooks."""
        model: nn.Module = super().unload()
        remove_routers(model)
        self.hooks.unwatch()
        return model

    def remove_empty_layers(self) -> None:
        """See [`RevertibleTuner.remove_empty_layers`]; PEFT keeps LoRA layers without adapters."""
        for path, layer in list(self.model.named_modules()):
            if isinstance(layer, LoraLayer) and not layer.r:
                parent, _, name = path.rpartition(".")
                self._replace_module(self.model.get_submodule(parent), name, layer.get_base_layer(), layer)

    def _check_merge_allowed(self) -> None:
        raise MiLoraError(NO_MERGE)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: always raises a [`MiLoraError`]."""
        raise MiLoraError("MiLoRA adapters cannot be combined: routers of different adapters have no weighted sum.")

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        # Replaces PEFT's method, which does not remove its hooks after an exception.
        names = kwargs.get("adapter_names")
        if names is None:
            return nullcontext()
        return entered(Scope(self.owner, adapter_names=check_row_names(self.hooks, list(names))))

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
                second copy of the affected weights, and other requests are refused; see [`MiLoraModel.merged_route`].
            **kwargs: See the backbone's `generate`.

        Raises:
            MiLoraError: If the cache already holds tokens and no route is given, a row is fully masked, a prompt is
                empty, or an adapter is being deleted; with `merge_route` if rows differ, a chosen layer is quantised or
                another request is running; with `compiled=True` if steps cannot be compiled.
        """
        named = {**dict(zip(("inputs", "generation_config"), args, strict=False)), **kwargs}
        hooks, model = self.hooks, self.model
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
        check_thread(self.owner)
        if hooks.is_off():
            return model.generate(*args, **kwargs)
        names, size = said(self.owner, "adapter_names"), size_given(named)
        if names is not None and merge_route:
            raise MiLoraError("Rows with different adapters have no common route to merge; leave out merge_route.")
        adapters = adapters_of(hooks, names)
        if route is None and said(self.owner, "route") is None:
            cache = named.get("past_key_values")
            # The bare backbone may have filled it if all adapters leave the prompt to it; the prefill checks that.
            if is_filled(cache) and len(hooks.late(adapters)) < len(adapters):
                raise MiLoraError(UNKNOWN_CACHE)
            if needs_own_pass(model, named):
                route = compute_route(hooks, inputs_given(model, named))
        with ExitStack() as stack:
            attended = named.get("attention_mask")
            generation = stack.enter_context(
                generating(self.owner, adapters, attended, size, route=route, adapter_names=names)
            )
            if merge_route and hooks.merged is None:
                generation.merge_into = lambda route: stack.enter_context(
                    merged_route(hooks, adapters[0], route, generation)
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
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        return compute_route(self.hooks, inputs, labels, adapter_names)

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
        return merged_route(self.hooks, (self.active_adapters or [""])[0], route, None)

    def train_all_experts(self, enabled: bool) -> None:
        """Makes every prompt choose all experts in training mode, or the configuration's `top_k` again.

        Generation and evaluation always use `top_k` experts. See [`milora.training.DenseStart`].
        """
        for router in self.hooks.routers.values():
            router.trains_all_experts = enabled

    def routing_statistics(self, reset: bool = False) -> dict[str, float]:
        """The load-balancing loss and each expert's share of the choices, averaged over training passes since the last
        `reset`."""
        summary = self.hooks.statistics.summary()
        if reset:
            self.hooks.statistics = RoutingStatistics()
        return summary
