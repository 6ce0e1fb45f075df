"""`MiLoraModel`: PEFT's LoRA model with a router in each block, which runs once per prompt."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from accelerate import init_empty_weights
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from milora.tuners.context import Scope, entered
from milora.tuners.continuous_batching import NoContinuousBatching
from milora.tuners.grouped import GroupedOwner
from milora.tuners.grouped.wrappers import PlannedWrapper
from milora.tuners.milora.config import MiLoraConfig
from milora.tuners.milora.expert import NO_MERGE, add_expert_place
from milora.tuners.milora.forward import RoutingHooks
from milora.tuners.milora.merging import MERGED
from milora.tuners.milora.routed import Place
from milora.tuners.milora.router import RouterLayer, add_routers, remove_routers, routers_of
from milora.tuners.milora.routes import Routes
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
        routes: The functions for routes.
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
        self.routes = Routes(self.hooks)

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
        place = Place(*lora_config.expert_places[current_key])
        add_expert_place(getattr(parent, target_name), adapter_name, place, self.owner)

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
            raise MiLoraError(f"{names} cannot be made active: {MERGED}.")
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
        """Refused.

        Raises:
            MiLoraError: Always: routers of different adapters have no weighted sum.
        """
        raise MiLoraError("MiLoRA adapters cannot be combined: routers of different adapters have no weighted sum.")

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        # Replaces PEFT's method, which does not remove its hooks after an exception.
        names = kwargs.get("adapter_names")
        if names is None:
            return nullcontext()
        return entered(Scope(self.owner, adapter_names=self.routes.check_names(list(names))))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """See [`Routes.generate`]."""
        return self.routes.generate(*args, **kwargs)

    def route(self, *args: Any, **kwargs: Any) -> Route:
        """See [`Routes.route`]."""
        return self.routes.route(*args, **kwargs)

    def use_route(self, route: Route | None) -> AbstractContextManager[None]:
        """See [`Routes.use_route`]."""
        return self.routes.use_route(route)

    def use_prompt(self, prompt: Tensor) -> AbstractContextManager[None]:
        """See [`Routes.use_prompt`]."""
        return self.routes.use_prompt(prompt)

    def record_routes(self) -> AbstractContextManager[list[Route]]:
        """See [`Routes.record_routes`]."""
        return self.routes.record_routes()

    def merged_route(self, route: Route) -> AbstractContextManager[None]:
        """See [`Routes.merged_route`]."""
        return self.routes.merged_route(route)

    def routing_statistics(self, reset: bool = False) -> dict[str, float]:
        """The load-balancing loss and each expert's share of the choices, averaged over training passes since the last
        reset.

        Args:
            reset: Reset afterwards.
        """
        return self.hooks.statistics.summary(reset)
