"""The tuner of IAPT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from milora.backbone.blocks import find_blocks, hidden_size
from milora.backbone.key_value import check_projection, find_input_norm
from milora.tuners.checkpointing import checkpoint_with_pass, is_checkpointed, restore_checkpoint_function
from milora.tuners.continuous_batching import NoContinuousBatching
from milora.tuners.grouped.compiling import is_compiled_by_transformers
from milora.tuners.iapt.config import IAPTConfig
from milora.tuners.iapt.layer import IAPTLayer
from milora.tuners.prefix import PrefixTuner
from milora.tuners.prompt_pass import PromptPass, PromptPasses, PromptTuner, needs_own_pass, one_token
from milora_core.errors import MiLoraError


class IAPTModel(NoContinuousBatching, PromptTuner, PrefixTuner):
    """A backbone whose layers read soft tokens that are written from the prompt, once.

    Made by `get_peft_model(model, IAPTConfig())`. A forward pass reads the prompt from its arguments: all attended
    tokens, or with labels those before the first supervised one.
    """

    method = "IAPT"
    prefix = "iapt_"
    tuner_layer_cls = IAPTLayer
    unknown_cache = (
        "The cache already holds tokens, and the soft tokens of the prompt that it begins with are not known here: "
        "they are kept only for a cache that this model has filled itself. Begin with the prompt and an empty cache."
    )

    def _pre_injection_hook(self, model: nn.Module, config: IAPTConfig, adapter_name: str) -> None:
        self.passes = PromptPasses()
        self._watches = []

    def complete_adapter(self, adapter_name: str, config: IAPTConfig, *args: Any, **kwargs: Any) -> None:
        """From now on the backbone's calls are watched for prompts."""
        self.watch()

    def _prepare_adapter_config(self, peft_config: IAPTConfig, model_config: dict[str, Any]) -> Any:
        config = super()._prepare_adapter_config(peft_config, model_config)
        # Each attention module with its block's input size and the module that the block's input enters.
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
        layer = IAPTLayer(path, size, self.passes)
        layer.read_from(self.model.get_submodule(entrance))
        return layer

    def restore(self) -> None:
        """See [`PrefixTuner.restore`]."""
        super().restore()
        self.unwatch()
        for module in self.model.modules():
            restore_checkpoint_function(module)

    def prompt_tuning_is_off(self) -> bool:
        """Whether the adapters are disabled or there is none."""
        return not self.active_adapters or any(layer.disable_adapters for layer in self.layers().values())

    def new_pass(self, attended: Tensor, arguments: dict[str, Any]) -> PromptPass:
        """See [`PromptTuner.new_pass`]; gradient checkpointing will recompute blocks in this pass."""
        if torch.is_grad_enabled():
            for module in self.model.modules():
                if is_checkpointed(module):
                    checkpoint_with_pass(module, self.passes, _unchanged)
        return super().new_pass(attended, arguments)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the backbone, with soft tokens written once, at the prefill.

        For assisted generation and chunked prefill, whose first pass is not the prompt, in a pass of its own before.
        Decode steps are not compiled, whatever the cache; see [`IAPTModel.why_not_compiled`].

        Args:
            *args: As for the backbone's `generate`.
            **kwargs: As for the backbone's `generate`.

        Raises:
            MiLoraError: If the cache already holds tokens, or a prompt is empty.
        """
        model: Any = self.model
        if self.prompt_tuning_is_off():
            return model.generate(*args, **kwargs)
        named = {**dict(zip(("inputs", "generation_config"), args, strict=False)), **kwargs}
        if is_compiled_by_transformers(model, named):
            kwargs["disable_compile"] = True
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            raise MiLoraError(
                "generate was given a cache that already holds tokens, and its first pass would not be the prompt. "
                "Give it the whole conversation and an empty cache, or go on from the cache in a loop of your own."
            )
        with self.passes.generating(kwargs.get("attention_mask")):
            if needs_own_pass(model, kwargs):
                names = ("input_ids", "inputs", "attention_mask", "inputs_embeds")
                prompts = {name: kwargs[name] for name in names if name in kwargs}
                model.generate(*args, **prompts, generation_config=one_token(model))
            return model.generate(*args, **kwargs)

    def why_not_compiled(self) -> str:
        """What keeps transformers from compiling the decode steps."""
        return "a decode step of IAPT reads what the pass over the prompt left behind, which torch.compile does not see"


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden
