"""Methods that do something once per prompt: which forward pass is a prompt's, and what was decided in it.

A Hugging Face model is called in many ways: by `generate`, whose first pass is the prompt and whose others are single
tokens; by a caller's own loop over a cache; by trainers, with labels; and block by block a second time, by gradient
checkpointing. A [`PromptTuner`] tells these apart where the model is called, and keeps one [`PromptPass`] in force that
layers read and write.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig

from milora.tuners.prompt import attended_tokens, prompt_of_call
from milora_core.errors import MiLoraError
from milora_core.routing import RationalActivation

OWN_PASS_OPTIONS = ("prompt_lookup_num_tokens", "assistant_early_exit", "prefill_chunk_size")
"""Options of `generate` under which its first pass is not the prompt: candidates follow it, or only a part comes."""


@dataclass
class PromptPass:
    """One forward pass over prompts, and what layers have worked out for them so far.

    A pass outlives its forward where it is needed again: in the decode steps of a generation, and in the backward pass
    under gradient checkpointing, which runs a block a second time.

    Attributes:
        rows: Number of rows of the batch.
        prompt: (rows, tokens), bool: the tokens of the prompts; `None` where nothing is to be read off them.
        values: What layers keep for later passes, by a key of their own.
    """

    rows: int
    prompt: Tensor | None
    values: dict[Any, Any] = field(default_factory=dict)


class Generation:
    """A running `generate`: its first forward pass is the prefill, whose pass the others follow."""

    def __init__(self, attended: Tensor | None) -> None:
        self.attended = attended
        self.prompt_pass: PromptPass | None = None


class _InForce(threading.local):
    """What is in force in a thread: requests served by several threads must not see each other's prompts."""

    def __init__(self) -> None:
        self.prompt_pass: PromptPass | None = None
        self.generation: Generation | None = None
        self.prompt: Tensor | None = None


class PromptPasses:
    """Holds what is in force: the running pass, the running generation, and what the caller said is the prompt."""

    def __init__(self) -> None:
        self._in_force = _InForce()
        self._of_cache: WeakKeyDictionary[Any, PromptPass] = WeakKeyDictionary()
        # Whether a generation's decode steps are compiled: they read what the prefill wrote, and no hook is traced.
        # For traced hooks only, which cannot ask for the thread: beside that generation others may run eagerly.
        self.is_compiled = False

    # A copied or pickled model starts with nothing in force: passes belong to the model that ran them.
    def __getstate__(self) -> dict[str, Any]:
        return {"in_force": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).__init__(self)

    @property
    def current(self) -> Any:
        """The pass that is running in this thread, or `None`."""
        return self._in_force.prompt_pass

    @property
    def prompt(self) -> Tensor | None:
        """The prompt's tokens, where the caller said which they are."""
        return self._in_force.prompt

    def begin(self, prompt_pass: PromptPass) -> None:
        """Puts a pass in force; in a generation it stays the one to follow until the generation ends."""
        self._in_force.prompt_pass = prompt_pass
        if self._in_force.generation is not None:
            self._in_force.generation.prompt_pass = prompt_pass

    def end(self, cache: Any = None) -> None:
        """Ends the running pass. Outside `generate`, the cache that it filled keeps it for later passes."""
        if self._in_force.generation is None and cache is not None and self.current is not None:
            self._of_cache[cache] = self.current
        self._in_force.prompt_pass = None

    def following(self) -> PromptPass | None:
        """The pass that the next forward of this thread's generation follows; `None` at its prefill."""
        generation = self._in_force.generation
        return None if generation is None else generation.prompt_pass

    def generation_mask(self) -> Tensor | None:
        """The attention mask that the caller gave to the running `generate`."""
        generation = self._in_force.generation
        return None if generation is None else generation.attended

    def of_cache(self, cache: Any) -> PromptPass | None:
        """The pass that filled a cache in an earlier forward of the caller's own loop."""
        return self._of_cache.get(cache)

    @contextmanager
    def generating(self, attended: Tensor | None) -> Iterator[Generation]:
        """In force: a generation. What it worked out is freed at the end, however that comes."""
        outer, self._in_force.generation = self._in_force.generation, Generation(attended)
        try:
            yield self._in_force.generation
        finally:
            self._in_force.generation = outer
            self._in_force.prompt_pass = None

    @contextmanager
    def prompting(self, prompt: Tensor) -> Iterator[None]:
        """In force: which tokens are the prompt, for passes whose labels do not say."""
        outer, self._in_force.prompt = self._in_force.prompt, prompt
        try:
            yield
        finally:
            self._in_force.prompt = outer

    @contextmanager
    def resuming(self, prompt_pass: PromptPass | None) -> Iterator[None]:
        """In force again: the pass of an earlier forward, while one of its blocks is recomputed."""
        outer, self._in_force.prompt_pass = self._in_force.prompt_pass, prompt_pass
        try:
            yield
        finally:
            self._in_force.prompt_pass = outer


class PromptTuner:
    """What a `BaseTuner` of PEFT needs to do something once per prompt; to be inherited from before the tuner's class.

    Subclasses call [`PromptTuner.watch`] when their first adapter is in place and [`PromptTuner.unwatch`] when the last
    has gone, and may override [`PromptTuner.new_pass`], [`PromptTuner.after_pass`],
    [`PromptTuner.prompt_tuning_is_off`] and [`PromptTuner.keeps_across_caches`].
    """

    model: nn.Module
    training: bool
    passes: PromptPasses
    _watches: list[Any]
    unknown_cache = (
        "The cache already holds tokens, and which route they had is not known. Pass the route that made it: "
        "model.generate(..., route=route), or `with model.use_route(route):`."
    )
    """What to say of a filled cache when what it was made with is not known."""

    def watch(self) -> None:
        """Sees every call of the backbone from now on."""
        if not self._watches:
            self._watches = [
                self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
                self.model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
            ]

    def unwatch(self) -> None:
        """Undoes [`PromptTuner.watch`]."""
        for handle in self._watches:
            handle.remove()
        self._watches = []

    @property
    def is_watching(self) -> bool:
        """Whether calls of the backbone are seen."""
        return bool(self._watches)

    def activation_parameters(self) -> list[nn.Parameter]:
        """Theta: the coefficients of the adapters' rational activations, as far as they train.

        In MiLoRA they are the routers' (equation 7 of Zhang et al. 2024), in IAPT those inside the bottlenecks.
        """
        return [
            parameter
            for module in self.model.modules()
            if isinstance(module, RationalActivation)
            for parameter in module.parameters()
            if parameter.requires_grad
        ]

    def new_pass(self, attended: Tensor, arguments: dict[str, Any]) -> PromptPass:
        """The pass of a forward that is neither a decode step nor the continuation of a known cache.

        Args:
            attended: (rows, tokens), bool: the tokens that are no padding.
            arguments: The model's arguments by name.

        Raises:
            MiLoraError: If the caller's own prompt mask has another shape.
        """
        return PromptPass(attended.shape[0], self.prompt_of(attended, arguments))

    def prompt_of(self, attended: Tensor, arguments: dict[str, Any]) -> Tensor:
        """(rows, tokens), bool: the prompts as the caller gave them, or as the labels tell."""
        prompt = self.passes.prompt
        if prompt is None:
            labels, shifted = labels_of(arguments)
            return prompt_of_call(self.model, attended, labels, shifted=shifted)
        if prompt.shape != attended.shape:
            raise MiLoraError(
                f"use_prompt was given a mask of shape {tuple(prompt.shape)}; the batch has {tuple(attended.shape)}."
            )
        return prompt.to(attended.device, torch.bool) & attended

    def after_pass(self, prompt_pass: Any, arguments: dict[str, Any], output: Any) -> Any:
        """What to do with the model's output in training; `None` leaves it."""
        return None

    def prompt_tuning_is_off(self) -> bool:
        """Whether the adapters are disabled or there is none."""
        return False

    def keeps_across_caches(self) -> bool:
        """Whether what a filled cache was made with is known by other means than the cache."""
        return False

    def use_prompt(self, prompt: Tensor) -> AbstractContextManager[None]:
        """`with model.use_prompt(mask):` says which tokens are the prompt, (batch, tokens), where no labels do."""
        return self.passes.prompting(prompt)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_dynamo_compiling() and self.passes.is_compiled:
            return
        following = self.passes.following()
        if following is not None:
            self.passes.begin(following)
            return
        if self.prompt_tuning_is_off():
            return
        arguments = arguments_of(module, args, kwargs)
        cache = arguments.get("past_key_values")
        is_filled = isinstance(cache, Cache) and not self.training and cache.get_seq_length() > 0
        if is_filled and not self.keeps_across_caches():
            known = self.passes.of_cache(cache)
            if known is None:
                raise MiLoraError(self.unknown_cache)
            self.passes.begin(known)
            return
        attended = attended_tokens({**arguments, **self._generation_mask(arguments)})
        self.passes.begin(self.new_pass(attended, arguments))

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() and self.passes.is_compiled:
            return None
        prompt_pass = self.passes.current
        cache = getattr(output, "past_key_values", None)
        self.passes.end(cache if isinstance(cache, Cache) else None)
        if prompt_pass is None or output is None or not self.training:
            return None
        return self.after_pass(prompt_pass, arguments_of(module, args, kwargs), output)

    def _generation_mask(self, arguments: dict[str, Any]) -> dict[str, Tensor]:
        # Generation with a static cache hands the model a prepared mask, in which a window may hide a part.
        mask = self.passes.generation_mask()
        source = arguments.get("input_ids")
        source = arguments.get("inputs_embeds") if source is None else source
        if mask is None or source is None or mask.dim() != 2 or source.shape[0] % mask.shape[0] != 0:
            return {}
        if mask.shape[1] != source.shape[1]:
            return {}
        return {"attention_mask": mask.repeat_interleave(source.shape[0] // mask.shape[0], dim=0)}


def arguments_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    if not args:
        return kwargs
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


def labels_of(arguments: dict[str, Any]) -> tuple[Tensor | None, bool]:
    """The labels of a call, and whether they are already shifted to the token that predicts them."""
    shifted = arguments.get("shift_labels")
    return (arguments.get("labels"), False) if shifted is None else (shifted, True)


def needs_own_pass(model: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether the first pass of a `generate` with these arguments is something else than the prompt."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    return kwargs.get("assistant_model") is not None or any(
        kwargs.get(name, getattr(config, name, None)) is not None for name in OWN_PASS_OPTIONS
    )


def one_token(model: nn.Module) -> GenerationConfig:
    """Settings under which `generate` is its prefill and no more."""
    own = getattr(model, "generation_config", None)
    special = {name: getattr(own, name, None) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    return GenerationConfig(max_new_tokens=1, do_sample=False, num_beams=1, **special)
