"""`MiLoraModel`: PEFT's LoRA model with a router in each block, asked once per prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import init_empty_weights
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from milora.tuners.continuous_batching import NoContinuousBatching
from milora.tuners.grouped import BASE_ROW, rows_by_adapter
from milora.tuners.milora.config import MiLoraConfig
from milora.tuners.milora.dispatch import Dispatcher
from milora.tuners.milora.expert import NO_MERGE, ExpertVariant, as_expert
from milora.tuners.milora.generation import GeneratingTuner
from milora.tuners.milora.layer import RouterLayer
from milora.tuners.milora.merging import MERGED
from milora.tuners.milora.named_rows import RoutedServing
from milora.tuners.milora.routers import add_routers, remove_routers, routers_of
from milora.tuners.milora.routing_pass import RoutingPass
from milora.tuners.milora.shared_weights import SharedWeights
from milora.tuners.milora.statistics import RoutingStatistics
from milora.tuners.milora.targets import fill_in_experts
from milora.tuners.outputs import add_to_loss
from milora.tuners.prompt import predicts_next_tokens, supervised_tokens
from milora.tuners.prompt_pass import labels_of
from milora.tuners.rollback import RevertibleTuner
from milora_core.errors import MiLoraError
from milora_core.routing import load_balancing_loss


class MiLoraModel(NoContinuousBatching, GeneratingTuner, RevertibleTuner, LoraModel):  # type: ignore[misc]
    """A backbone with MiLoRA adapters; made by `get_peft_model(model, MiLoraConfig())`.

    Each block gets a router (`milora_router`), each adapted module stays a LoRA layer of PEFT. A forward pass reads the
    prompt from its arguments, each block's router decides from the block's input on the prompt, and the chosen modules
    serve the prompt and, by way of `generate` or the cache, every token after it (Zhang et al. 2024, section 3).

    What PEFT asks of a tuner is here; what callers ask of routes is [`GeneratingTuner`]'s and [`MergingTuner`]'s.
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
        self._shared_weights = SharedWeights()
        self._watches = []
        self.grouped = RoutedServing(model, self.dispatcher)

    def complete_adapter(self, adapter_name: str, config: MiLoraConfig, *args: Any, **kwargs: Any) -> None:
        """Gives every block with experts its router."""
        low_memory = bool(kwargs.get("low_cpu_mem_usage", False))
        with init_empty_weights() if low_memory else nullcontext():
            add_routers(self.model, adapter_name, config, self.dispatcher)
        for router in routers_of(self.model).values():
            router.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self.watch()

    def _prepare_adapter_config(self, peft_config: MiLoraConfig, model_config: dict[str, Any]) -> MiLoraConfig:
        fill_in_experts(peft_config, self.model)
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

    # ------------------------------------------------------- adapters and files

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's, for one adapter at a time.

        Raises:
            MiLoraError: For several: a prompt is routed by one adapter. `adapter_names` gives each row its own. For
                another than the active one, while a route of that is merged.
        """
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise MiLoraError(
                f"Only one MiLoRA adapter can be active; found {list(adapter_name)}. To serve several in one batch, "
                "give each row its own: model.generate(..., adapter_names=[...])."
            )
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if self.dispatcher.merged is not None and names != self.active_adapters:
            raise MiLoraError(f"{names} cannot be made active: {MERGED}.")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's, routers included."""
        super().delete_adapter(adapter_name)
        # PEFT skips modules whose path contains the prefix "lora_", which "milora_router" does.
        for router in routers_of(self.model).values():
            router.delete_adapter(adapter_name)
            router.set_adapter(self.active_adapters)
        remove_routers(self.model, empty_only=True)

    def unload(self) -> nn.Module:
        """The bare backbone, without LoRA layers, routers or hooks."""
        model: nn.Module = super().unload()
        remove_routers(model)
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
        if self.dispatcher.merged is not None:
            raise MiLoraError(f"adapter_names gives rows their own adapters, but {MERGED}.")
        unknown = {name for name in names if name != BASE_ROW} - set(self.peft_config)
        if unknown:
            raise MiLoraError(f"No adapter named {sorted(unknown)}; there are {sorted(self.peft_config)}.")
        with self.grouped.naming_rows(list(names)):
            yield

    def keeps_across_caches(self) -> bool:
        """A route in force says how any cache goes on."""
        return self.dispatcher.forced is not None

    def prompt_tuning_is_off(self) -> bool:
        """Whether the adapters are disabled or there is none."""
        return not self.active_adapters or any(router.disable_adapters for router in routers_of(self.model).values())

    def new_pass(self, attended: Tensor, arguments: dict[str, Any]) -> RoutingPass:
        """See [`PromptTuner.new_pass`]."""
        rows = attended.shape[0]
        names = self.dispatcher.adapter_names
        adapter_rows: Mapping[str, list[int] | None] = (
            dict.fromkeys(self.active_adapters) if names is None else rows_by_adapter(names, rows)
        )
        forced = self.dispatcher.forced
        if self.dispatcher.merged is not None and forced is not self.dispatcher.merged:
            raise MiLoraError("Another route is merged into the backbone's weights; leave it before this one is used.")
        if forced is not None:
            if rows % len(forced) != 0:
                raise MiLoraError(f"The route in force is for {len(forced)} prompts; the batch has {rows} rows.")
            return RoutingPass(rows, None, adapter_rows=adapter_rows, forced=forced.expand(rows // len(forced)))
        prompt = self.prompt_of(attended, arguments)
        unlabelled = labels_of(arguments)[0] is None and self.passes.prompt is None
        if unlabelled and self.training and torch.is_grad_enabled() and predicts_next_tokens(self.model):
            self.statistics.warn_without_labels()
        return RoutingPass(rows, prompt, adapter_rows=adapter_rows)

    def after_pass(self, prompt_pass: RoutingPass, arguments: dict[str, Any], output: Any) -> Any:
        """Adds the load-balancing loss to a labelled pass of training; see [`PromptTuner.after_pass`]."""
        labels, shifted = labels_of(arguments)
        if labels is None or prompt_pass.forced is not None:
            return None
        tokens = supervised_tokens(labels, shifted=shifted or not predicts_next_tokens(self.model))
        for adapter, routings in prompt_pass.routings.items():
            losses = [load_balancing_loss(routing.decision.probabilities) for routing in routings.values()]
            balance = torch.stack([loss.to(losses[0].device) for loss in losses]).mean()
            self.statistics.record(balance, routings)
            coefficient = self.peft_config[adapter].load_balancing_coef
            if coefficient > 0:
                output = add_to_loss(output, coefficient * balance, tokens, arguments.get("num_items_in_batch"))
        return output

    def routing_statistics(self, reset: bool = False) -> dict[str, float]:
        """The load-balancing loss and each expert's share of the choices, means over training passes since the reset.

        Args:
            reset: Start anew after this.
        """
        return self.statistics.summary(reset)
