"""The tuner of IAPT."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from milora.backbone.blocks import find_blocks, hidden_size
from milora.backbone.key_value import check_projection, find_input_norm
from milora.tuners.caches import BARE, is_filled
from milora.tuners.checkpointing import checkpoint_in_context, is_checkpointed, restore_checkpoint_function
from milora.tuners.context import (
    ContextOwner,
    ForwardContext,
    Generation,
    Prompts,
    Scope,
    caller_scope,
    check_thread,
    generating,
)
from milora.tuners.continuous_batching import NoContinuousBatching
from milora.tuners.generate_options import (
    inputs_given,
    is_compiled_by_transformers,
    needs_own_pass,
    one_token,
    size_given,
)
from milora.tuners.iapt.config import IAPTConfig
from milora.tuners.iapt.layer import IAPTLayer
from milora.tuners.prefix import PrefixTuner
from milora.tuners.prompt_hooks import PromptHooks
from milora_core.errors import MiLoraError

UNKNOWN_CACHE = (
    "The cache already holds tokens, but the soft tokens of its prompt are unknown, because this model did not fill "
    "it. Start with the prompt and an empty cache."
)


class IAPTHooks(PromptHooks):
    """See [`PromptHooks`].

    Args:
        backbone: The called model.
        owner: The model's owner of contexts.
        tuner: The model's tuner.
    """

    def __init__(self, backbone: nn.Module, owner: ContextOwner, tuner: IAPTModel) -> None:
        super().__init__(backbone, owner)
        self.tuner = tuner

    def is_off(self) -> bool:
        """See [`PromptHooks.is_off`]."""
        layers = self.tuner.layers().values()
        return not self.tuner.active_adapters or any(layer.disable_adapters for layer in layers)

    def begin(self, arguments: dict[str, Any], attended: Tensor, generation: Generation | None) -> ForwardContext:
        """See [`PromptHooks.begin`]. Gradient checkpointing recomputes blocks in this context."""
        if torch.is_grad_enabled():
            for module in self.backbone.modules():
                if is_checkpointed(module):
                    checkpoint_in_context(module, self.owner)
        prompt = self.prompt_of(attended, arguments)
        own = None if generation is not None else self.owner.identities.begin(self.tuner.active_adapters)
        use = generation.use if generation is not None else own
        assert use is not None
        prompts = Prompts(attended.shape[0], prompt, use)
        return ForwardContext(self.owner, prompts, generation=generation, use=own)

    def follow(self, prompts: Any, arguments: dict[str, Any], generation: Generation | None) -> ForwardContext:
        """See [`PromptHooks.follow`]."""
        use = None
        if generation is None:
            self.owner.identities.check(prompts.use)
            use = self.owner.identities.begin(prompts.use.adapters)
        return ForwardContext(self.owner, prompts, "follow", use=use)

    def fill(self, made: Any, cache: Cache, arguments: dict[str, Any], generation: Generation | None) -> ForwardContext:
        """See [`PromptHooks.fill`]."""
        if made is None or made == BARE:
            raise MiLoraError(UNKNOWN_CACHE)
        if list(made.use.adapters) != list(self.tuner.active_adapters):
            raise MiLoraError(
                f"The cache was filled by the adapter {', '.join(made.use.adapters)!r}, and "
                f"{', '.join(self.tuner.active_adapters)!r} is active now. Activate the same adapter, or start with "
                "the prompt and an empty cache."
            )
        return self.follow(made, arguments, None)


class IAPTModel(NoContinuousBatching, PrefixTuner):
    """A backbone whose layers attend to soft tokens that are computed once from the prompt.

    Created by `get_peft_model(model, IAPTConfig())`. The prompt of a forward pass is all attended tokens, or with
    labels, the attended tokens before the first supervised one.
    """

    method = "IAPT"
    prefix = "iapt_"
    tuner_layer_cls = IAPTLayer

    def _pre_injection_hook(self, model: nn.Module, config: IAPTConfig, adapter_name: str) -> None:
        self.owner = ContextOwner()
        self.hooks = IAPTHooks(model, self.owner, self)

    def complete_adapter(self, adapter_name: str, config: IAPTConfig, *args: Any, **kwargs: Any) -> None:
        """Registers the hooks on the backbone."""
        self.hooks.watch()

    def _prepare_adapter_config(self, peft_config: IAPTConfig, model_config: dict[str, Any]) -> Any:
        config = super()._prepare_adapter_config(peft_config, model_config)
        # Attention module -> its block's input size, and the module that reads the block's input.
        self._entrances: dict[str, tuple[int, str]] = {}
        for block in find_blocks(self.model, config.blocks):
            for path in self.choose_modules(config, block):
                if f"{block.path}.{path}" in config.module_paths:
                    entrance = find_input_norm(block) or path
                    self._entrances[f"{block.path}.{path}"] = (
                        hidden_size(self.model, block),
                        f"{block.path}.{entrance}",
                    )
        return config

    def check_module(self, attention: nn.Module, path: str) -> None:
        """See [`PrefixTuner.check_module`]."""
        super().check_module(attention, path)
        check_projection(attention, path)

    def new_layer(self, path: str, module: nn.Module) -> IAPTLayer:
        """See [`AttachmentTuner.new_layer`]."""
        size, entrance = self._entrances[path]
        layer = IAPTLayer(path, size, self.owner)
        layer.read_from(self.model.get_submodule(entrance))
        return layer

    def restore(self) -> None:
        """See [`PrefixTuner.restore`]."""
        super().restore()
        self.hooks.unwatch()
        for module in self.model.modules():
            restore_checkpoint_function(module)

    def use_prompt(self, prompt: Tensor) -> AbstractContextManager[None]:
        """`with model.use_prompt(mask):` marks the prompts' tokens, (batch, tokens), for calls without labels."""
        return caller_scope(Scope(self.owner, prompt=prompt))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the backbone. The soft tokens are computed once, at the prefill.

        In assisted generation and chunked prefill, the first pass is not the prompt. A separate pass before the
        generation then computes the soft tokens. Decode steps are not compiled with any cache; see
        [`IAPTModel.why_not_compiled`].

        Args:
            *args: See the backbone's `generate`.
            **kwargs: See the backbone's `generate`.

        Raises:
            MiLoraError: If the cache already holds tokens, or a prompt is empty.
        """
        model: Any = self.model
        check_thread(self.owner)
        if self.hooks.is_off():
            return model.generate(*args, **kwargs)
        named = {**dict(zip(("inputs", "generation_config"), args, strict=False)), **kwargs}
        if is_compiled_by_transformers(model, named):
            kwargs["disable_compile"] = True
        cache = kwargs.get("past_key_values")
        if is_filled(cache):
            raise MiLoraError(
                "The cache already holds tokens, so the first pass of generate would not be the prompt. Pass the "
                "whole conversation with an empty cache, or continue the cache in your own loop."
            )
        attended, size = named.get("attention_mask"), size_given(named)
        with generating(self.owner, self.active_adapters, attended, size) as generation:
            if needs_own_pass(model, named):
                model.generate(**inputs_given(model, named), generation_config=one_token(model))
                generation.follows_all = True
            return model.generate(*args, **kwargs)

    def why_not_compiled(self) -> str:
        """Why transformers cannot compile the decode steps."""
        return "a decode step of IAPT reads what the pass over the prompt left behind, which torch.compile does not see"
