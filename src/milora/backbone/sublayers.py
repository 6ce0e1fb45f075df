"""Finds the two sub-layers of a Transformer block, attention and feed-forward, to which adapters are added."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from milora.backbone.blocks import Block
from milora_core.errors import MiLoraError

SUBLAYER_NAMES: dict[str, tuple[str, ...]] = {
    "attention": ("self_attn", "self_attention", "attention", "attn", "linear_attn"),
    "feed_forward": ("mlp", "feed_forward", "ffn", "block_sparse_moe", "mlp_block", "moe"),
}
"""By kind, the names of the block's child that is the sub-layer; the first existing one is used."""

FEED_FORWARD_PAIRS = (("fc1", "fc2"),)
"""The first and the last module of feed-forward sub-layers without their own module (OPT)."""


@dataclass(frozen=True)
class Sublayer:
    """A sub-layer of a block: the modules whose input it reads and whose output it returns, by path relative to the
    block.

    Both are the same module if the sub-layer is one module. Its output may be a tensor or a tuple that begins with one.
    Some backbones (Bloom, MPT) add the residual inside; an addition to the output is then added to the sum.
    """

    kind: str
    input_path: str
    output_path: str


def find_sublayers(block: Block) -> dict[str, Sublayer]:
    """The sub-layers of a block by kind, `attention` first.

    A kind is missing if the block has another layer instead, such as the convolutions of LFM2 or the state-space layers
    of hybrid models.

    Raises:
        MiLoraError: If the block has neither.
    """
    children = {
        name: child
        for name, child in block.module.named_children()
        if not isinstance(child, nn.ModuleList | nn.ModuleDict)
    }
    found = {}
    for kind, names in SUBLAYER_NAMES.items():
        pairs = [(name, name) for name in names] + list(FEED_FORWARD_PAIRS if kind == "feed_forward" else ())
        pair = next((pair for pair in pairs if all(name in children for name in pair)), None)
        if pair is not None:
            found[kind] = Sublayer(kind, *pair)
    if not found:
        raise MiLoraError(
            f"Could not find the attention and the feed-forward of {block.path} ({type(block.module).__name__}): "
            f"looked for {', '.join(name for names in SUBLAYER_NAMES.values() for name in names)} or fc1 with fc2, "
            f"found {', '.join(children) or 'nothing'}. Choose a method that adapts linear modules, such as MiLoRA."
        )
    return found
