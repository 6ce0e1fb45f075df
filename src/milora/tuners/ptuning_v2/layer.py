"""Learned keys and values for an attention module."""

from __future__ import annotations

from torch import Tensor, nn

from milora.backbone.key_value import find_keys_and_values
from milora.tuners.prefix import PrefixLayer
from milora.tuners.projected_vector import ProjectedVector
from milora.tuners.ptuning_v2.config import PTuningV2Config


class PTuningV2Layer(PrefixLayer):
    """`attention(Q, [P_K; K], [P_V; V])` with `P_K = S_K W` and `P_V = S_V W`, the same for every input.

    `S_K` and `S_V` (tokens, projection_dim) are learned, and so is `W` (projection_dim, heads * head_dim), which they
    share. Without a projection, `P_K` and `P_V` are learned directly. The prefix has no positions.

    `W` starts at zero and the seeds at random, so every key scores 0 and every value is 0. Attention starts as the
    backbone's, scaled down a little and without randomness. As with any prefix it does not start as exactly the
    backbone's, because the softmax gives every key some weight.
    """

    child_name = "ptuning_v2_"
    adapter_layer_names = ("vectors",)

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.vectors = nn.ModuleDict()

    def update_layer(self, adapter: str, module: nn.Module, config: PTuningV2Config) -> None:
        """See [`Attachment.update_layer`]."""
        found = find_keys_and_values(module, self.path)
        self.heads = found.heads
        self.vectors[adapter] = ProjectedVector(found.size, config.projection_dim, (2, config.num_virtual_tokens))

    def keys_and_values(self, adapter: str, attention: nn.Module, batch: int) -> tuple[Tensor, Tensor]:
        """See [`PrefixLayer.keys_and_values`]."""
        vectors: Tensor = self.vectors[adapter]()  # (2, tokens, heads * head_dim)
        by_head = vectors.reshape(*vectors.shape[:2], self.heads, -1).transpose(1, 2)  # (2, heads, tokens, head_dim)
        keys, values = by_head.unsqueeze(1).expand(-1, batch, -1, -1, -1)
        return keys, values
