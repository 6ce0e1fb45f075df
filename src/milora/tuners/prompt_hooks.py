"""Hooks for methods that act once per prompt. They see every call of the model: prompts, decode steps, recomputations.

A Hugging Face model is called by `generate` (the first pass is the prompt, later passes are single tokens), by a
caller's own loop over a cache, by trainers with labels, and from inside a running generation. A cache stores the
prompts that filled it, so it shows which prompts a call continues.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from milora.tuners.caches import BARE, cache_of, check_state, is_filled, made_by, remember
from milora.tuners.context import (
    ContextOwner,
    ForwardContext,
    Generation,
    check_thread,
    drop_interrupted,
    enter,
    generation_of,
    leave,
    running,
    said,
)
from milora.tuners.prompt import arguments_of, attended_tokens, labels_of, prompt_of_call
from milora_core.errors import MiLoraError


class PromptHooks(ABC):
    """The hooks on a backbone. Subclasses define the contexts of a method's passes.

    Args:
        backbone: The called model.
        owner: The model's owner of contexts.
    """

    def __init__(self, backbone: nn.Module, owner: ContextOwner) -> None:
        self.backbone = backbone
        self.owner = owner
        self._handles: list[Any] = []

    def watch(self) -> None:
        """Registers the hooks: from now on they see every call of the backbone."""
        if not self._handles:
            self._handles = [
                self.backbone.register_forward_pre_hook(self._before_forward, with_kwargs=True),
                self.backbone.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
            ]

    def unwatch(self) -> None:
        """Undoes [`PromptHooks.watch`]."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @abstractmethod
    def is_off(self) -> bool:
        """Whether the adapters are disabled or there is none."""

    @abstractmethod
    def begin(self, arguments: dict[str, Any], attended: Tensor, generation: Generation | None) -> ForwardContext:
        """Creates the context of a pass over prompts.

        Args:
            arguments: The model's arguments by name.
            attended: (rows, tokens), bool: the tokens that are not padding.
            generation: The generation, if the pass is its prefill.
        """

    @abstractmethod
    def follow(self, prompts: Any, arguments: dict[str, Any], generation: Generation | None) -> ForwardContext:
        """Creates the context of a pass that continues prompts.

        Args:
            prompts: The prompts that filled the cache, or the result of the generation's prefill.
            arguments: The model's arguments by name.
            generation: The generation, if the pass is one of its steps; `None` in a caller's own loop.
        """

    @abstractmethod
    def fill(
        self, made: Any, cache: Cache, arguments: dict[str, Any], generation: Generation | None
    ) -> ForwardContext | None:
        """Creates the context of a pass on a filled cache outside the steps of a running generation.

        Args:
            made: The [`Prompts`] that filled the cache, [`BARE`], or `None`.
            cache: The cache.
            arguments: The model's arguments by name.
            generation: The generation, if this is its first pass.

        Raises:
            MiLoraError: If the cache cannot be continued.
        """

    def after(self, context: ForwardContext, arguments: dict[str, Any], output: Any) -> Any:
        """Returns a changed model output in training, or `None` to keep it."""
        return None

    def prompt_of(self, attended: Tensor, arguments: dict[str, Any]) -> Tensor:
        """(rows, tokens), bool: the prompts from the caller's `use_prompt`, or from the labels.

        Raises:
            MiLoraError: If the caller's prompt mask has another shape.
        """
        prompt: Tensor | None = said(self.owner, "prompt")
        if prompt is None:
            labels, shifted = labels_of(arguments)
            if labels is None and generation_of(self.owner) is not None:
                return attended  # Also in a trainer's step, for example the rollouts of GRPO.
            return prompt_of_call(self.backbone, attended, labels, shifted=shifted)
        if prompt.shape != attended.shape:
            raise MiLoraError(
                f"use_prompt was given a mask of shape {tuple(prompt.shape)}; the batch has {tuple(attended.shape)}."
            )
        return prompt.to(attended.device, torch.bool) & attended

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_dynamo_compiling():
            if not self.owner.is_compiled and not self.is_off():
                raise MiLoraError("Decode steps are compiled by the adapted model's own generate (compiled=True).")
            return
        drop_interrupted(self.owner)
        arguments = arguments_of(module, args, kwargs)
        context = self._context(arguments)
        if context is not None:
            enter(context)

    def _context(self, arguments: dict[str, Any]) -> ForwardContext | None:
        packed = said(self.owner, "packed")
        if packed is not None:
            return ForwardContext(self.owner, packed, plan=packed.plan)
        cache = cache_of(arguments)
        made = made_by(cache)
        generation = generation_of(self.owner)
        if generation is not None and generation.prompts is not None:
            is_next = made is generation.prompts or (cache is None and _begins_with(arguments, generation.tokens))
            if is_next or (generation.follows_all and made is None):
                generation.follows_all = False
                return self.follow(generation.prompts, arguments, generation)
            generation = None  # An unrelated call from inside the generation.
        check_thread(self.owner)
        if self.is_off():
            if cache is not None and not is_filled(cache):
                remember(cache, BARE)  # Also if the cache was reset: its earlier tokens are gone.
            return None
        check_state(arguments)
        if cache is not None and is_filled(cache):
            return self.fill(made, cache, arguments, generation)
        return self.begin(arguments, attended_tokens(_with_mask(arguments, generation)), generation)

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return None
        context = running(self.owner)
        cache = cache_of(output) if isinstance(output, Mapping) else None
        if cache is None:  # Not returned by every model, nor with `return_dict=False`.
            cache = cache_of(arguments_of(module, args, kwargs))
        if context is None:
            if cache is not None and made_by(cache) is None:
                remember(cache, BARE)
            return None
        leave(context)
        if context.use is not None:
            self.owner.identities.end(context.use)
        if cache is not None:
            remember(cache, context.prompts)
        generation = context.generation
        if output is None:
            return None
        if generation is not None:
            generation.prompts = context.prompts
            if cache is None:
                generation.tokens = source_of(arguments_of(module, args, kwargs))
        elif context.mode != "follow" and module.training:
            return self.after(context, arguments_of(module, args, kwargs), output)
        return None


def source_of(arguments: Mapping[str, Any]) -> Any:
    """The tokens of a call, `input_ids` or `inputs_embeds`, (batch, tokens, ...); `None` without either."""
    source = arguments.get("input_ids")
    return arguments.get("inputs_embeds") if source is None else source


def _begins_with(arguments: dict[str, Any], first: Tensor | None) -> bool:
    """Whether a call without a cache begins with the prefill's tokens, as the next step of a generation does."""
    source = source_of(arguments)
    if first is None or source is None or source.dim() != first.dim() or source.shape[1] <= first.shape[1]:
        return False
    return source.shape[0] == first.shape[0] and torch.equal(source[:, : first.shape[1]], first)


def _with_mask(arguments: dict[str, Any], generation: Generation | None) -> dict[str, Any]:
    """The arguments with the mask that the caller gave to `generate`.

    Generation with a static cache passes the model a prepared mask, in which a window may hide a part of the prompt.
    """
    mask, source = None if generation is None else generation.attended, source_of(arguments)
    if mask is None or source is None or mask.dim() != 2 or source.shape[0] % mask.shape[0] != 0:
        return arguments
    if mask.shape[1] != source.shape[1]:
        return arguments
    return {**arguments, "attention_mask": mask.repeat_interleave(source.shape[0] // mask.shape[0], dim=0)}
