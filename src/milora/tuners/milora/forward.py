"""Determines for one call of the model the adapter and route of each row and the adapted tokens."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache

from milora.tuners.caches import BARE
from milora.tuners.context import ForwardContext, Generation, said
from milora.tuners.grouped import GroupedOwner, GroupedPlan, check_names, rows_by_adapter
from milora.tuners.identity import Use
from milora.tuners.milora.plans.decode import DecodePlan
from milora.tuners.milora.plans.passes import PassPlan
from milora.tuners.milora.routed import RoutedPrompts
from milora.tuners.milora.router import RouterLayer
from milora.tuners.milora.statistics import RoutingStatistics
from milora.tuners.outputs import add_to_loss
from milora.tuners.plan import BasePlan, Plan
from milora.tuners.prompt import attended_tokens, labels_of, predicts_next_tokens, supervised_tokens
from milora.tuners.prompt_hooks import PromptHooks, source_of
from milora_core.errors import MiLoraError
from milora_core.routing import Route, load_balancing_loss

UNKNOWN_CACHE = (
    "The cache already holds tokens with an unknown route. Pass the route that made it: "
    "model.generate(..., route=route), or `with model.use_route(route):`. For the prompt that filled the cache, it is "
    "model.route(**inputs)."
)


MERGED = (
    "A route is merged into the backbone's weights, so the model cannot run other prompts, routes or adapters, or the "
    "bare backbone. Wait until the generation or merged_route that merged it ends, or generate without merge_route."
)


class Merged(NamedTuple):
    """The route, of one row, that the backbone's weights contain, and the generation that merged it, if one did."""

    route: Route
    generation: Generation | None


class RoutingHooks(PromptHooks):
    """See [`PromptHooks`].

    Attributes:
        tuner: The [`milora.tuners.milora.model.MiLoraModel`].
        routers: Block -> its router.
        merged: The merged route; see [`milora.tuners.milora.merging.merged_route`].
    """

    owner: GroupedOwner

    def __init__(self, backbone: nn.Module, owner: GroupedOwner, tuner: Any) -> None:
        super().__init__(backbone, owner)
        self.tuner = tuner
        self.routers: dict[str, RouterLayer] = {}
        self.statistics = RoutingStatistics()
        self.merged: Merged | None = None

    def is_off(self) -> bool:
        """See [`PromptHooks.is_off`]. It is `False` while a route is merged: then no pass is the bare backbone's."""
        return self.merged is None and (not self.tuner.active_adapters or self._is_disabled())

    def _is_disabled(self) -> bool:
        return any(router.disable_adapters for router in self.routers.values())  # PEFT disables all at once.

    def late(self, adapters: Iterable[str]) -> list[str]:
        """Those of the adapters that leave the prompt to the bare backbone (late adaptation)."""
        return [name for name in adapters if self.tuner.peft_config[name].adapted_tokens == "completion"]

    def _check_merged(self) -> None:
        if self.merged is not None and (said(self.owner, "merged") is not self.merged or self._is_disabled()):
            raise MiLoraError(MERGED)

    def begin(
        self, arguments: dict[str, Any], attended: Tensor, generation: Generation | None, cached: int = 0
    ) -> ForwardContext:
        """See [`PromptHooks.begin`]. `cached` tokens of the prompts are already in the cache, made by the backbone."""
        self._check_merged()
        if self.merged is not None:
            is_other = self.merged.generation not in (None, generation)
            if is_other or said(self.owner, "route") is not self.merged.route:
                raise MiLoraError(MERGED)
        rows, tokens = attended.shape
        adapter_rows, forced = self._adapter_rows(rows, generation), self._forced(rows, generation)
        late, changed = self.late(adapter_rows), attended
        if forced is None and cached:
            self._check_readable(adapter_rows)
        prompt = self._prompt(arguments, attended, generation, cached) if forced is None or late else None
        if prompt is not None and late:
            is_whole = generation is None or cached + tokens >= generation.columns
            changed = completion_tokens(prompt, attended) if is_whole else torch.zeros_like(attended)
        if torch.is_grad_enabled():
            for router in self.routers.values():
                router.recompute_in_context(self.backbone.get_submodule(router.block))
        use = self.owner.identities.begin(adapter_rows) if generation is None else generation.use
        prompts = RoutedPrompts(rows, prompt, use, adapter_rows=adapter_rows, forced=forced)
        if late and len(late) == len(adapter_rows):
            prompts.bare = cached + int((~changed).int().cumprod(dim=1).sum(dim=1).min())
        if generation is not None:
            generation.seen = cached + tokens
        own = use if generation is None else None
        return self._planned(prompts, "route", dict.fromkeys(late, changed), generation, own)

    def follow(self, prompts: Any, arguments: dict[str, Any], generation: Generation | None) -> ForwardContext:
        """See [`PromptHooks.follow`]."""
        self._check_merged()
        adapted: dict[str, Tensor] = {}
        own = None
        source = source_of(arguments)
        if generation is None:
            self.owner.identities.check(prompts.use)
            prompts = prompts.for_rows(source.shape[0])
            own = self.owner.identities.begin(prompts.adapter_rows)
        elif prompts.prompt is not None:
            adapted = self._late_tokens(prompts, source, generation)
        return self._planned(prompts, "follow", adapted, generation, own)

    def fill(self, made: Any, cache: Cache, arguments: dict[str, Any], generation: Generation | None) -> ForwardContext:
        """See [`PromptHooks.fill`]."""
        rows = source_of(arguments).shape[0]
        adapter_rows = self._adapter_rows(rows, generation)
        is_late = len(self.late(adapter_rows)) == len(adapter_rows)
        length = int(cache.get_seq_length()) if is_late else 0
        is_bare = made == BARE
        if isinstance(made, RoutedPrompts):
            self.owner.identities.check(made.use)
            self._check_adapters(made, adapter_rows, rows)
            is_bare = length <= made.bare
        if is_late and is_bare:
            if made == BARE:
                self._check_shareable(adapter_rows)
            return self.begin(arguments, attended_tokens(arguments), generation, length)
        if is_late and generation is not None:
            raise MiLoraError(
                "The cache holds tokens that an adapter has changed. With adapted_tokens='completion' the whole "
                "prompt of a turn goes through the bare backbone: crop the cache to the part that the bare backbone "
                "made, or start with an empty cache."
            )
        if said(self.owner, "route") is None:
            if not isinstance(made, RoutedPrompts):
                raise MiLoraError(UNKNOWN_CACHE)
            return self.follow(made, arguments, None)
        context = self.begin(arguments, attended_tokens(arguments), generation)
        return self._planned(context.prompts, "route", {}, generation, context.use)

    def _planned(
        self,
        prompts: RoutedPrompts,
        mode: Any,
        adapted: Mapping[str, Tensor],
        generation: Generation | None,
        use: Use | None,
    ) -> ForwardContext:
        """The context with the plan of its layers."""
        is_known = prompts.forced is not None or mode == "follow"
        if generation is not None and generation.merge_into is not None and self.merged is None and is_known:
            generation.merge_into(prompts.forced if prompts.forced is not None else prompts.route())
        is_compiled = self.owner.is_compiled_for(generation if generation is not None else prompts)
        is_grouped = prompts.adapter is None or is_compiled
        if is_grouped and (mode == "route" or generation is None):
            # Also if the prompt needs no stacks, because the steps after it do.
            self.owner.refresh()
        plan: Plan
        if self.merged is not None:
            plan, mode = BasePlan(), "merged"
        elif generation is not None and mode == "follow" and not (is_grouped or adapted or _needs_parameters()):
            assert prompts.adapter is not None
            generation.steps = plan = generation.steps or DecodePlan(prompts.adapter, prompts)
        else:
            plan = PassPlan(prompts, adapted)
            if is_grouped and not adapted:
                rows, kept = prompts.rows, prompts.values
                plan = GroupedPlan(self.owner, prompts.shares, plan, kept, rows=rows, is_compiled=is_compiled)
        begun = None if generation is None or generation.prompts is not None else generation
        return ForwardContext(self.owner, prompts, mode, plan, begun, use)

    def _adapter_rows(self, rows: int, generation: Generation | None) -> dict[str, list[int] | None]:
        names = said(self.owner, "adapter_names")
        if names is None:
            return dict.fromkeys(self.tuner.active_adapters)
        check_names(names, rows, None if generation is None else generation.inputs)
        return dict(rows_by_adapter(names, rows))

    def _forced(self, rows: int, generation: Generation | None) -> Route | None:
        route: Route | None = said(self.owner, "route")
        if route is None or len(route) == rows:
            return route
        is_expanded = generation is not None and len(route) == generation.inputs and rows % len(route) == 0
        if len(route) != 1 and not is_expanded:
            raise MiLoraError(
                f"The given route is for {len(route)} prompts; the batch has {rows} rows. Give a row for each prompt "
                "(route.expand repeats rows), or a route of one row for all."
            )
        return route.expand(rows // len(route))

    def _prompt(
        self, arguments: dict[str, Any], attended: Tensor, generation: Generation | None, cached: int
    ) -> Tensor:
        """(rows, tokens), bool: the prompts' tokens, without an assistant's candidates after them."""
        prompt = self.prompt_of(attended, arguments)
        is_marked = labels_of(arguments)[0] is not None or said(self.owner, "prompt") is not None
        is_training = self.backbone.training and torch.is_grad_enabled()
        if is_training and not is_marked and predicts_next_tokens(self.backbone):
            warnings.warn(
                "A training pass had no labels, so each whole row counts as the prompt. If rows contain completions, "
                "mark the prompt: `with model.use_prompt(mask):`.",
                stacklevel=2,
            )
        if generation is not None and cached + attended.shape[1] > generation.columns:
            prompt = prompt.clone()
            prompt[:, generation.columns - cached :] = False
        return prompt

    def _late_tokens(self, prompts: RoutedPrompts, source: Tensor, generation: Generation) -> dict[str, Tensor]:
        """The adapted tokens of a later pass of a generation that still reads the prompt or reads it again."""
        late = self.late(prompts.adapter_rows)
        if not late:
            return {}
        rows, tokens = source.shape[:2]
        if generation.tokens is not None:  # No cache: the whole text again.
            assert prompts.prompt is not None
            prompt = nn.functional.pad(prompts.prompt, (0, tokens - prompts.prompt.shape[1]))
            return dict.fromkeys(late, completion_tokens(prompt, torch.ones_like(prompt)))
        start, generation.seen = generation.seen, generation.seen + tokens
        if start >= generation.columns:
            return {}
        columns = torch.arange(start, start + tokens, device=source.device)
        return dict.fromkeys(late, (columns >= generation.columns - 1).expand(rows, tokens))

    def _check_readable(self, adapters: Iterable[str]) -> None:
        """Refuses routers that need hidden states of cached prompt tokens."""
        for adapter in adapters:
            config = self.tuner.peft_config[adapter]
            if config.pooler != "last" or config.router_window is not None:
                raise MiLoraError(
                    f"The cache holds the beginning of the prompt, but the routers of {adapter!r} must read it "
                    f"(pooler={config.pooler!r}, router_window={config.router_window}). Pass a route, pass the whole "
                    "prompt with an empty cache, or train with pooler='last'."
                )

    def _check_shareable(self, adapters: Iterable[str]) -> None:
        """Refuses adapters that change the tokens that the bare backbone has cached."""
        for adapter in adapters:
            if not self.tuner.peft_config[adapter].leaves_prompt_bare:
                raise MiLoraError(
                    f"The bare backbone filled the cache, but {adapter!r} has its own embeddings, norms or biases "
                    "(modules_to_save, trainable_token_indices, bias), which change the prompt's tokens. Start with "
                    "an empty cache."
                )

    @staticmethod
    def _check_adapters(made: RoutedPrompts, adapter_rows: Mapping[str, list[int] | None], rows: int) -> None:
        if made.adapter is None:
            made.for_rows(rows)
        found = {adapter: own for adapter, own in made.adapter_rows.items() if own is None or own}
        if found != adapter_rows:
            raise MiLoraError(
                f"The cache was filled by the adapters {sorted(found)}, but this pass uses {sorted(adapter_rows)}: "
                "another adapter cannot continue their tokens. Activate the same adapter, pass the same "
                "adapter_names, or start with the prompt and an empty cache."
            )

    def after(self, context: ForwardContext, arguments: dict[str, Any], output: Any) -> Any:
        """Adds the load-balancing loss to a labelled pass of training (Zhang et al. 2024, equations 4 and 5)."""
        labels, shifted = labels_of(arguments)
        prompts: RoutedPrompts = context.prompts
        if labels is None or prompts.forced is not None:
            return None
        tokens = supervised_tokens(labels, shifted=shifted or not predicts_next_tokens(self.backbone))
        for adapter, routings in prompts.routings.items():
            losses = [load_balancing_loss(routing.decision.probabilities) for routing in routings.values()]
            balance = torch.stack([loss.to(losses[0].device) for loss in losses]).mean()
            self.statistics.record(balance, routings)
            coefficient = self.tuner.peft_config[adapter].load_balancing_coef
            if coefficient > 0:
                output = add_to_loss(output, coefficient * balance, tokens, arguments.get("num_items_in_batch"))
        return output


def completion_tokens(prompt: Tensor, attended: Tensor) -> Tensor:
    """(rows, tokens), bool: the last token of each prompt, which predicts the first new one, and all later tokens."""
    columns = torch.arange(prompt.shape[1], device=prompt.device)
    last = torch.where(prompt, columns, -1).amax(dim=1, keepdim=True)
    return (columns >= last) & attended


def _needs_parameters() -> bool:
    """Autocast casts weights for every product, and gradients need the parameters themselves."""
    return torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
