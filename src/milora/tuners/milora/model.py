"""`MiLoraModel`: PEFT's LoRA model with a router in each block, asked once per prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import init_empty_weights
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from milora.backbone.blocks import OWN_ROUTER, find_blocks, hidden_size
from milora.errors import MiLoraError
from milora.routing import Route, check_top_k, load_balancing_loss
from milora.tuners.checkpointing import restore_checkpoint_function
from milora.tuners.grouped import lora_layers
from milora.tuners.grouped.compiling import compiled_settings, is_compiled_by_transformers
from milora.tuners.milora.config import MiLoraConfig, activations_by_block
from milora.tuners.milora.dispatch import Dispatcher, RoutingPass, chosen_modules
from milora.tuners.milora.expert import NO_MERGE, ExpertVariant, as_expert
from milora.tuners.milora.grouped import RoutedServing
from milora.tuners.milora.layer import RouterLayer
from milora.tuners.milora.merging import SharedWeights, common_route, merged
from milora.tuners.milora.statistics import RoutingStatistics
from milora.tuners.outputs import add_to_loss
from milora.tuners.prompt import supervised_tokens
from milora.tuners.prompt_pass import PromptTuner, labels_of, needs_own_pass, one_token
from milora.tuners.rollback import RevertibleTuner
from milora.tuners.targets import listed_modules, targeted_modules

BASE_ROW = "__base__"
"""PEFT's name for a row without an adapter."""


class MiLoraModel(PromptTuner, RevertibleTuner, LoraModel):  # type: ignore[misc]
    """A backbone with MiLoRA adapters; made by `get_peft_model(model, MiLoraConfig())`.

    Each block gets a router (`milora_router`), each adapted module stays a LoRA layer of PEFT. A forward pass reads the
    prompt from its arguments, each block's router decides from the block's input on the prompt, and the chosen modules
    serve the prompt and, by way of `generate` or the cache, every token after it (Zhang et al. 2024, section 3).
    """

    tuner_layer_cls = (LoraLayer, RouterLayer)
    uses_shared_state = True
    active_adapter: str | list[str]

    # ---------------------------------------------------------------- building

    def _pre_injection_hook(self, model: nn.Module, config: MiLoraConfig, adapter_name: str) -> None:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise MiLoraError(f"{type(model).__name__} is an encoder-decoder; MiLoRA routes decoder-only models.")
        self.passes = self.dispatcher = Dispatcher()
        self.statistics = RoutingStatistics()
        self._weights = SharedWeights()
        self._watches = []
        self.grouped = RoutedServing(model, self.dispatcher, self._row_names)

    def complete_adapter(self, adapter_name: str, config: MiLoraConfig, *args: Any, **kwargs: Any) -> None:
        """Gives every block with experts its router."""
        low_memory = bool(kwargs.get("low_cpu_mem_usage", False))
        with init_empty_weights() if low_memory else nullcontext():
            self._add_routers(adapter_name, config)
        for router in self._routers().values():
            router.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self.watch()

    def _prepare_adapter_config(self, peft_config: MiLoraConfig, model_config: dict[str, Any]) -> MiLoraConfig:
        blocks = find_blocks(self.model, peft_config.blocks)
        candidates = {block.path: block.linears for block in blocks}
        listed = peft_config.experts
        experts = listed_modules(listed, candidates) if listed else targeted_modules(peft_config, candidates)
        routed = [block for block in blocks if experts.get(block.path)]
        check_top_k(peft_config.top_k, max(len(experts[block.path]) for block in routed))
        activations = activations_by_block(peft_config.router_activation, len(routed))
        peft_config.router_activation = activations
        if isinstance(activations, list) and len(activations) != len(routed):
            raise MiLoraError(
                f"router_activation lists {len(activations)} activations, and {len(routed)} blocks have a router."
            )
        lists = [experts[block.path] for block in routed]
        alike = len(routed) == len(blocks) and all(of_block == lists[0] for of_block in lists)
        peft_config.experts = lists[0] if alike else {block.path: experts[block.path] for block in routed}
        # Spelled out, because PEFT would read "all-linear" as every linear layer of the model, routers included.
        peft_config.target_modules = list(dict.fromkeys(expert for of_block in lists for expert in of_block))
        # Each expert's block, and its place among the block's experts.
        places = {
            f"{block.path}.{expert}": (block.path, index)
            for block in routed
            for index, expert in enumerate(experts[block.path])
        }
        peft_config.expert_places = places
        modules = dict(self.model.named_modules())
        if all(type(_unwrapped(modules[path])).__name__ == "Conv1D" for path in places):
            # Set here, PEFT has no need to correct it with a warning for every layer.
            peft_config.fan_in_fan_out = True
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: MiLoraConfig, key: str) -> Any:
        if key in peft_config.expert_places:
            return True
        # PEFT tells an excluded module by a false value of its own, and warns where there is none.
        return check_target_module_exists(peft_config, key) and False

    def _create_and_replace(
        self,
        lora_config: MiLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        block, index = lora_config.expert_places[current_key]
        layer = getattr(parent, target_name)
        inner = layer.lora_variant.get(adapter_name)
        layer.lora_variant[adapter_name] = ExpertVariant(self.dispatcher, block, index, inner)
        as_expert(layer, self.dispatcher)

    def _experts_of(self, config: MiLoraConfig) -> dict[str, list[str]]:
        if isinstance(config.experts, dict):
            return config.experts
        experts = config.experts or []
        return {block.path: experts for block in find_blocks(self.model, config.blocks)}

    def _add_routers(self, adapter_name: str, config: MiLoraConfig) -> None:
        blocks = {block.path: block for block in find_blocks(self.model, config.blocks)}
        for index, (path, experts) in enumerate(self._experts_of(config).items()):
            block = blocks[path]
            router = getattr(block.module, OWN_ROUTER, None)
            if router is None:
                router = RouterLayer(path, hidden_size(self.model, block), self.dispatcher)
                block.module.add_module(OWN_ROUTER, router)
                router._hook = block.module.register_forward_pre_hook(router.before_block, with_kwargs=True)
            activation = config.router_activation
            router.update_layer(
                adapter_name,
                config,
                tuple(experts),
                activation[index] if isinstance(activation, list) else activation,
                next(block.module.parameters()).device,
            )

    def _routers(self) -> dict[str, RouterLayer]:
        return {module.block: module for module in self.model.modules() if isinstance(module, RouterLayer)}

    # ------------------------------------------------------- adapters and files

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's, for one adapter at a time.

        Raises:
            MiLoraError: For several: a prompt is routed by one adapter. `adapter_names` gives each row its own.
        """
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise MiLoraError(
                f"Only one MiLoRA adapter can be active; found {list(adapter_name)}. To serve several in one batch, "
                "give each row its own: model.generate(..., adapter_names=[...])."
            )
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's, routers included."""
        super().delete_adapter(adapter_name)
        # PEFT skips modules whose path contains the prefix "lora_", which "milora_router" does.
        for router in self._routers().values():
            router.delete_adapter(adapter_name)
            router.set_adapter(self.active_adapters)
        for module in list(self.model.modules()):
            own = getattr(module, OWN_ROUTER, None)
            if isinstance(own, RouterLayer) and not own.experts:
                _remove_router(module)

    def unload(self) -> nn.Module:
        """The bare backbone, without LoRA layers, routers or hooks."""
        model: nn.Module = super().unload()
        for module in list(model.modules()):
            _remove_router(module)
        self.unwatch()
        return model

    def remove_empty_layers(self) -> None:
        """See [`RevertibleTuner.remove_empty_layers`]; PEFT leaves LoRA layers without adapters in their places."""
        for path, layer in list(self.model.named_modules()):
            if isinstance(layer, LoraLayer) and not layer.r:
                parent, _, name = path.rpartition(".")
                self._replace_module(self.model.get_submodule(parent), name, layer.get_base_layer(), layer)

    def _check_merge_allowed(self) -> None:
        raise MiLoraError(NO_MERGE)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused.

        Raises:
            MiLoraError: Always: routers of different adapters have no weighted sum.
        """
        raise MiLoraError("MiLoRA adapters cannot be combined: routers of different adapters have no weighted sum.")

    # ------------------------------------------------------------ forward passes

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT's own does not remove its hooks after an exception, and knows beams only as a keyword of generate. Here
        # the names are expanded to the batch that arrives.
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise MiLoraError("adapter_names is for inference; call model.eval() first.")
        unknown = {name for name in names if name != BASE_ROW} - set(self.peft_config)
        if unknown:
            raise MiLoraError(f"No adapter named {sorted(unknown)}; there are {sorted(self.peft_config)}.")
        handles: list[Any] = []
        try:
            with self.grouped.serving(), self.dispatcher.serving(list(names)):
                for path, layer in lora_layers(self.model):
                    if path not in self.grouped.stacks.modules:
                        handles.append(layer.register_forward_pre_hook(self._name_rows, with_kwargs=True))
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _name_rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = self._row_names(args[0])
        return None if names is None else (args, {**kwargs, "adapter_names": names})

    def _row_names(self, x: Tensor) -> list[str] | None:
        """The adapter of each row of a layer's input, `None` where the rows have no adapters of their own."""
        running = self.dispatcher.current
        names = self.dispatcher.adapter_names
        if running is None or names is None:
            return None
        if x.shape[0] != running.rows:
            raise MiLoraError(
                f"{type(self.model).__name__} flattens batch and tokens before one of the adapted modules, so rows "
                "with different adapters cannot be told apart there. Serve one adapter at a time."
            )
        return _expanded(names, running.rows, "adapter_names")

    def keeps_across_caches(self) -> bool:
        """A route in force says how any cache goes on."""
        return self.dispatcher.forced is not None

    def prompt_tuning_is_off(self) -> bool:
        """Whether the adapters are disabled or there is none."""
        return not self.active_adapters or any(router.disable_adapters for router in self._routers().values())

    def new_pass(self, attended: Tensor, arguments: dict[str, Any]) -> RoutingPass:
        """See [`PromptTuner.new_pass`]."""
        rows = attended.shape[0]
        names = self.dispatcher.adapter_names
        adapter_rows: dict[str, list[int] | None] = dict.fromkeys(self.active_adapters)
        if names is not None:
            names = _expanded(names, rows, "adapter_names")
            adapter_rows = {
                name: [row for row, of_row in enumerate(names) if of_row == name]
                for name in dict.fromkeys(names)
                if name != BASE_ROW
            }
        forced = self.dispatcher.forced
        if self.dispatcher.merged is not None and forced is not self.dispatcher.merged:
            raise MiLoraError("Another route is merged into the backbone's weights; leave it before this one is used.")
        if forced is not None:
            if rows % len(forced) != 0:
                raise MiLoraError(f"The route in force is for {len(forced)} prompts; the batch has {rows} rows.")
            return RoutingPass(rows, None, adapter_rows=adapter_rows, forced=forced.expand(rows // len(forced)))
        unlabelled = labels_of(arguments)[0] is None and self.passes.prompt is None
        if unlabelled and self.training and torch.is_grad_enabled():
            self.statistics.warn_without_labels()
        return RoutingPass(rows, self.prompt_of(attended, arguments), adapter_rows=adapter_rows)

    def after_pass(self, prompt_pass: RoutingPass, arguments: dict[str, Any], output: Any) -> Any:
        """Adds the load-balancing loss to a labelled pass of training; see [`PromptTuner.after_pass`]."""
        labels, shifted = labels_of(arguments)
        if labels is None or prompt_pass.forced is not None:
            return None
        tokens = supervised_tokens(labels, shifted=shifted)
        for adapter, routings in prompt_pass.routings.items():
            losses = [load_balancing_loss(routing.decision.probabilities) for routing in routings.values()]
            balance = torch.stack([loss.to(losses[0].device) for loss in losses]).mean()
            self.statistics.record(balance, routings)
            coefficient = self.peft_config[adapter].load_balancing_coef
            if coefficient > 0:
                output = add_to_loss(output, coefficient * balance, tokens, arguments.get("num_items_in_batch"))
        return output

    # -------------------------------------------------------------------- routes

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
        if compiled and merge_route:
            raise MiLoraError("A merged route is not served by compiled steps: leave out compiled or merge_route.")
        if compiled:
            kwargs |= compiled_settings(named)
        elif compiled is False or merge_route:
            kwargs["disable_compile"] = True
        if self.prompt_tuning_is_off():
            return model.generate(*args, **kwargs)
        if not compiled and is_compiled_by_transformers(model, {**named, **kwargs}):
            compiled = self.grouped.can_compile()
            kwargs["disable_compile"] = not compiled
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
            self.grouped.compiled() if compiled else nullcontext(),
            self._weights.generating(),
            self._merging() if merge_route else nullcontext(),
        ):
            output = model.generate(*args, **kwargs)
        if self.dispatcher.records is not None:
            assert isinstance(generation.prompt_pass, RoutingPass)
            self.dispatcher.records.append(generation.prompt_pass.route(tuple(self._routers())))
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
                return generation.prompt_pass.route(tuple(self._routers()))
        finally:
            self.train(training)

    def use_route(self, route: Route) -> AbstractContextManager[None]:
        """`with model.use_route(route):` makes passes and generations follow a route; the routers are not asked.

        A batch of a multiple of the route's rows (beams, several return sequences) repeats each row in succession.
        """
        return self.dispatcher.forcing(route)

    @contextmanager
    def merged_route(self, route: Route) -> Iterator[None]:
        """`with model.merged_route(route):` has a route in force as `use_route` has, merged into the weights.

        Its experts then cost nothing a token. The weights that it changes are there twice for as long; the backbone's
        own come back at the end bit for bit, however that comes. Merged weights are rounded to the backbone's type, so
        in bfloat16 the outputs are close to those of `use_route`, and not the same. Meanwhile other threads that call
        the backbone are refused.

        Raises:
            MiLoraError: If the route's rows differ or it is not of this adapter, the model is in training mode or its
                adapters are disabled, a chosen layer is quantised, offloaded or shares its weight, another thread is
                generating, or a route is merged already.
        """
        with self._weights.owned(), self._merge(route):
            yield

    @contextmanager
    def _merge(self, route: Route) -> Iterator[None]:
        if self.training:
            raise MiLoraError("A route is merged for inference; call model.eval() first.")
        if self.prompt_tuning_is_off():
            raise MiLoraError("The adapters are disabled, so there is nothing to merge.")
        if self.dispatcher.adapter_names is not None:
            raise MiLoraError("Rows with adapters of their own have no one route to merge; leave out adapter_names.")
        route = common_route(route)
        adapter = self.active_adapters[0]
        gates = chosen_modules(self._routers(), route, adapter)
        with (
            merged(self.model, gates, adapter),
            self.dispatcher.forcing(route),
            self.dispatcher.following_merged(route),
        ):
            yield

    @contextmanager
    def _merging(self) -> Iterator[None]:
        """Has the generation that begins merge its route as soon as it is known."""
        if self.dispatcher.merged is not None:
            yield
            return
        with self._weights.owned(), ExitStack() as stack, self.dispatcher.merging(stack):
            yield

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_dynamo_compiling():
            super()._before_forward(module, args, kwargs)
            return
        self._weights.begin_forward()
        if self.dispatcher.merged is not None and self.prompt_tuning_is_off():
            raise MiLoraError("The adapters are disabled while a route is merged: the backbone's weights contain it.")
        follows = self.passes.following() is not None
        super()._before_forward(module, args, kwargs)
        stack, running = self.dispatcher.merge_into, self.dispatcher.current
        if stack is None or running is None or running.is_merged:
            return
        if running.forced is not None or follows:
            route = running.forced if running.forced is not None else running.route(tuple(self._routers()))
            stack.enter_context(self._merge(route))

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        try:
            return super()._after_forward(module, args, kwargs, output)
        finally:
            if not torch.compiler.is_dynamo_compiling():
                self._weights.end_forward()

    def record_routes(self) -> AbstractContextManager[list[Route]]:
        """`with model.record_routes() as routes:` gets the route of every `generate` inside, once it has ended.

        It is the decision that the generation itself made, or followed, on the backbone's device; nothing is computed
        for it. With beams or several return sequences a prompt has as many equal rows in succession as the prefill had.
        """
        return self.dispatcher.recording()

    def routing_statistics(self, reset: bool = False) -> dict[str, float]:
        """The load-balancing loss and each expert's share of the choices, means over training passes since the reset.

        Args:
            reset: Start anew after this.
        """
        return self.statistics.summary(reset)


def _expanded(names: list[str], rows: int, what: str) -> list[str]:
    if not names or rows % len(names) != 0:
        raise MiLoraError(f"{what} names {len(names)} rows; the batch has {rows}.")
    return [name for name in names for _ in range(rows // len(names))]


def _unwrapped(module: nn.Module) -> nn.Module:
    return getattr(module, "base_layer", module)


def _remove_router(block: nn.Module) -> None:
    router = getattr(block, OWN_ROUTER, None)
    if isinstance(router, RouterLayer):
        router._hook.remove()
        restore_checkpoint_function(block)
        delattr(block, OWN_ROUTER)
