"""The routers of a backbone's blocks: put in for an adapter, found, asked for what a route chose, and taken out."""

from __future__ import annotations

import torch
from torch import nn

from milora.backbone.blocks import OWN_ROUTER, find_blocks, hidden_size
from milora.tuners.checkpointing import restore_checkpoint_function
from milora.tuners.milora.config import MiLoraConfig
from milora.tuners.milora.dispatch import Dispatcher
from milora.tuners.milora.layer import RouterLayer, follow
from milora_core.routing import Route


def add_routers(backbone: nn.Module, adapter: str, config: MiLoraConfig, dispatcher: Dispatcher) -> None:
    """Gives every block with experts a router for an adapter; the blocks' own layers are made where they are missing.

    Args:
        backbone: The model with the blocks.
        adapter: The adapter's name.
        config: Its configuration, with `experts` filled in.
        dispatcher: Where new router layers are to write their decisions to.
    """
    blocks = {block.path: block for block in find_blocks(backbone, config.blocks)}
    experts = config.experts if isinstance(config.experts, dict) else dict.fromkeys(blocks, config.experts or [])
    for index, (path, of_block) in enumerate(experts.items()):
        block = blocks[path]
        router = getattr(block.module, OWN_ROUTER, None)
        if router is None:
            router = RouterLayer(path, hidden_size(backbone, block), dispatcher)
            block.module.add_module(OWN_ROUTER, router)
            router._hook = block.module.register_forward_pre_hook(router.before_block, with_kwargs=True)
        activation = config.router_activation
        router.update_layer(
            adapter,
            config,
            tuple(of_block),
            activation[index] if isinstance(activation, list) else activation,
            next(block.module.parameters()).device,
        )


def routers_of(model: nn.Module) -> dict[str, RouterLayer]:
    """A model's routers by their block's path."""
    return {module.block: module for module in model.modules() if isinstance(module, RouterLayer)}


def remove_routers(model: nn.Module, *, empty_only: bool = False) -> None:
    """Takes routers out of their blocks, with their hooks.

    Args:
        model: The model with the blocks.
        empty_only: Leave those that have an adapter.
    """
    for module in list(model.modules()):
        router = getattr(module, OWN_ROUTER, None)
        if isinstance(router, RouterLayer) and not (empty_only and router.experts):
            router._hook.remove()
            restore_checkpoint_function(module)
            delattr(module, OWN_ROUTER)


def chosen_modules(model: nn.Module, route: Route, adapter: str) -> dict[str, float]:
    """Path of each module that a route of one row chose -> its gate.

    Args:
        model: The model with the routers.
        route: A route of one row.
        adapter: The adapter whose route it is.

    Raises:
        MiLoraError: If the route is not of this adapter and backbone.
    """
    gates: dict[str, float] = {}
    for block, router in routers_of(model).items():
        if adapter not in router.experts:
            continue
        experts = router.experts[adapter]
        decision = follow(route, block, experts, None, torch.device("cpu"))
        of_block = zip(experts, decision.gates[0].tolist(), strict=True)
        gates |= {f"{block}.{expert}": gate for expert, gate in of_block if gate != 0}
    return gates
