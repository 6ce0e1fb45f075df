"""Soft tokens of an attention module, computed once per prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from milora.backbone.key_value import project_keys_and_values
from milora.tuners.context import ContextOwner, Prompts, running_pass
from milora.tuners.iapt.config import IAPTConfig
from milora.tuners.iapt.generator import SoftTokenGenerator
from milora.tuners.prefix import PrefixLayer


class IAPTLayer(PrefixLayer):
    """`attention(Q, [norm(S) W_K; K], [norm(S) W_V; V])` with the soft tokens `S = generator(H)`.

    `H` (prompt tokens, d) are the hidden states of the prompt at the block's input. `norm`, `W_K` and `W_V` are the
    layer's own, frozen; soft tokens have no positions.

    The soft tokens are computed at the block's input norm. Gradient checkpointing recomputes this part too, so no
    tensor with a graph enters the block from outside. Decode steps use the keys and values that the pass over the
    prompt has stored.

    Args:
        path: Path of the attention module.
        size: Size d of the hidden states.
        owner: The model's owner of contexts.
    """

    child_name = "iapt_"
    adapter_layer_names = ("generator",)

    def __init__(self, path: str, size: int, owner: ContextOwner) -> None:
        super().__init__(path)
        self.size = size
        self.owner = owner
        self.generator = nn.ModuleDict()

    def update_layer(self, adapter: str, module: nn.Module, config: IAPTConfig) -> None:
        """See [`Attachment.update_layer`]."""
        orders = (config.rational_orders[0], config.rational_orders[1])
        self.generator[adapter] = SoftTokenGenerator(self.size, config.bottleneck, config.num_virtual_tokens, orders)

    def read_from(self, entrance: nn.Module) -> None:
        """Reads the block's input at a module: the block's first norm, or the attention if there is no norm."""
        self._handles.append(entrance.register_forward_pre_hook(self._before_entrance, with_kwargs=True))

    def keys_and_values(self, adapter: str, attention: nn.Module, batch: int) -> tuple[Tensor, Tensor]:
        """See [`PrefixLayer.keys_and_values`]."""
        values = self._running().values
        # Removed, because in training the pass must not keep a graph that it is part of.
        soft_tokens = values.pop((self.path, adapter, "soft tokens"), None)
        if soft_tokens is None:
            pair: tuple[Tensor, Tensor] = values[self.path, adapter]
        else:
            pair = project_keys_and_values(attention, self.path, soft_tokens)
            if not self._writes_anew():
                values[self.path, adapter] = pair
        rows = pair[0].shape[0]
        if rows == batch:
            return pair
        # The caller has repeated the rows of the cache.
        return pair[0].repeat_interleave(batch // rows, dim=0), pair[1].repeat_interleave(batch // rows, dim=0)

    def _before_entrance(self, entrance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.disable_adapters:
            return
        prompts = self._running()
        for adapter in self.active_adapters:
            if adapter in self.generator and (self._writes_anew() or (self.path, adapter) not in prompts.values):
                hidden = self.read_input(args, kwargs)
                assert prompts.prompt is not None
                soft_tokens = self.generator[adapter](hidden, prompts.prompt.to(hidden.device)).to(hidden.dtype)
                if getattr(entrance, self.child_name, None) is not self:
                    # A call would run this hook again.
                    soft_tokens = entrance.forward(soft_tokens)
                prompts.values[self.path, adapter, "soft tokens"] = soft_tokens

    def _writes_anew(self) -> bool:
        """Whether the pass trains. Its blocks may run twice, so nothing is kept."""
        return self.training and torch.is_grad_enabled()

    def _running(self) -> Prompts:
        """Returns the prompts of the running pass; raises a `RuntimeError` if none is running."""
        prompts: Prompts = running_pass(self.owner, self.path).prompts
        return prompts
