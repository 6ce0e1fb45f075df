"""Base of the methods that add keys and values to each layer's attention: P-tuning v2 and IAPT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from milora.backbone.blocks import Block
from milora.backbone.key_value import find_keys_and_values
from milora.backbone.prefix_attention import (
    WITH_PREFIX,
    PrefixSource,
    allow_prefix,
    check_prefix_support,
    disallow_prefixes,
    implementation_of,
)
from milora.backbone.sublayers import find_sublayers
from milora.tuners.attachment import Attachment, AttachmentConfig, AttachmentTuner
from milora_core.errors import MiLoraError

WITHOUT_KEYS = "linear_attn"
"""The name of sub-layers that replace attention in some blocks of hybrid models. They have no keys."""


@dataclass
class PrefixConfig(AttachmentConfig):
    """Base of the configurations of methods with prefixes.

    Args:
        num_virtual_tokens: Number of extra keys and values of each layer.

    Raises:
        MiLoraError: If `num_virtual_tokens` is below 1.
    """

    num_virtual_tokens: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_virtual_tokens < 1:
            raise MiLoraError(f"num_virtual_tokens must be at least 1; found {self.num_virtual_tokens}.")


class PrefixLayer(Attachment, PrefixSource):
    """The extra keys and values of one attention module. Those of several active adapters are concatenated.

    Subclasses implement [`PrefixLayer.keys_and_values`] instead of [`Attachment.adapt`].
    """

    def keys_and_values(self, adapter: str, attention: nn.Module, batch: int) -> tuple[Tensor, Tensor]:
        """An adapter's keys and values, (batch, key-value heads, tokens, head_dim) each."""
        raise NotImplementedError(f"{type(self).__name__} does not define its keys and values.")

    def prefix(self, attention: nn.Module, batch: int) -> tuple[Tensor, Tensor] | None:
        """See [`PrefixSource.prefix`]."""
        if self.disable_adapters:
            return None
        pairs = [self.keys_and_values(a, attention, batch) for a in self.active_adapters if a in self.adapters()]
        if len(pairs) < 2:
            return pairs[0] if pairs else None
        keys, values = zip(*pairs, strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The forward hook; it only checks that attention used the prefix.

        Raises:
            MiLoraError: If the attention implementation was changed, so the prefix was not used.
        """
        implementation = implementation_of(module)
        if not self.disable_adapters and implementation not in WITH_PREFIX.values():
            raise MiLoraError(
                f"The attention of {self.path} was set to {implementation!r} after its adapter was added, which "
                f"disables the adapter. Set it to one of {', '.join(WITH_PREFIX.values())}, or choose the "
                "implementation when loading the backbone."
            )


class PrefixTuner(AttachmentTuner):
    """Base of tuners whose layers are [`PrefixLayer`]s."""

    tuner_layer_cls: type[PrefixLayer]

    def choose_modules(self, config: Any, block: Block) -> dict[str, nn.Module]:
        """Returns the block's attention; empty if the block has no attention with keys."""
        sublayer = find_sublayers(block).get("attention")
        if sublayer is None or sublayer.output_path == WITHOUT_KEYS:
            return {}
        return {sublayer.output_path: block.module.get_submodule(sublayer.output_path)}

    def check_module(self, attention: nn.Module, path: str) -> None:
        """Checks that an attention module can be adapted, before the model is changed.

        Raises:
            MiLoraError: If it cannot be adapted.
        """
        check_prefix_support(attention, path)
        find_keys_and_values(attention, path)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        config = super()._prepare_adapter_config(peft_config, model_config)
        for path in sorted(config.module_paths):
            self.check_module(self.model.get_submodule(path), path)
        return config

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        super()._create_and_replace(peft_config, adapter_name, target, *args, **kwargs)
        allow_prefix(target)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter. Deleting the last one restores attention."""
        super().delete_adapter(adapter_name)
        if not self.layers():
            self.restore()

    def unload(self) -> nn.Module:
        """Returns the backbone with its original attention."""
        model = super().unload()
        self.restore()
        return model

    def restore(self) -> None:
        """Undoes changes of the backbone other than attached layers; called when the last layer is removed."""
        disallow_prefixes(self.model)
