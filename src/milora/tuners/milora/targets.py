"""Finds the experts of a MiLoRA configuration in a backbone's blocks."""

from __future__ import annotations

from torch import nn

from milora.backbone.blocks import find_blocks
from milora.tuners.milora.config import MiLoraConfig, activations_by_block
from milora.tuners.targets import listed_modules, targeted_modules
from milora_core.errors import MiLoraError
from milora_core.routing import check_top_k


def fill_in_experts(config: MiLoraConfig, backbone: nn.Module) -> None:
    """Fills in the fields of a configuration that depend on the backbone.

    These are `experts`, `target_modules`, the activations of the routed blocks, and `expert_places`, which is not
    saved: each expert's path in the backbone -> its block, and its index among the block's experts.

    Raises:
        MiLoraError: If the backbone has no such modules, `top_k` exceeds the experts of every block, or the number of
            activations differs from the number of routed blocks.
    """
    blocks = find_blocks(backbone, config.blocks)
    candidates = {block.path: block.linears for block in blocks}
    listed = config.experts
    experts = listed_modules(listed, candidates) if listed else targeted_modules(config, candidates)
    routed = [block for block in blocks if experts.get(block.path)]
    check_top_k(config.top_k, max(len(experts[block.path]) for block in routed))
    activations = activations_by_block(config.router_activation, len(routed))
    config.router_activation = activations
    if isinstance(activations, list) and len(activations) != len(routed):
        raise MiLoraError(
            f"router_activation lists {len(activations)} activations, but {len(routed)} blocks have a router."
        )
    lists = [experts[block.path] for block in routed]
    alike = len(routed) == len(blocks) and all(of_block == lists[0] for of_block in lists)
    config.experts = lists[0] if alike else {block.path: experts[block.path] for block in routed}
    # Explicit names, because PEFT would read "all-linear" as every linear layer of the model, including routers.
    config.target_modules = list(dict.fromkeys(expert for of_block in lists for expert in of_block))
    config.expert_places = {
        f"{block.path}.{expert}": (block.path, index)
        for block in routed
        for index, expert in enumerate(experts[block.path])
    }
    modules = dict(backbone.named_modules())
    if all(
        type(getattr(modules[path], "base_layer", modules[path])).__name__ == "Conv1D" for path in config.expert_places
    ):
        # Set here, so PEFT does not correct it with a warning for every layer.
        config.fan_in_fan_out = True
