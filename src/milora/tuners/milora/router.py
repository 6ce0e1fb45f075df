"""A block's router as a layer that PEFT saves and switches, and functions that add, find and remove routers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from milora.backbone.blocks import OWN_ROUTER, find_blocks, hidden_size
from milora.tuners.bare_layer import BareTunerLayer
from milora.tuners.checkpointing import checkpoint_in_context, is_checkpointed, restore_checkpoint_function
from milora.tuners.context import ContextOwner, generation_of, running, running_pass
from milora.tuners.milora.config import MiLoraConfig
from milora.tuners.milora.packed import PackedTokens
from milora.tuners.milora.routed import BlockRouting, RoutedPrompts, Selection, select
from milora_core.errors import MiLoraError
from milora_core.routing import (
    Decision,
    Route,
    RouterProjection,
    build_activation,
    build_pooler,
    choose,
    expert_probabilities,
)

TRL_REFERENCE = "ref"
"""TRL's name of the reference policy: an adapter with the configuration of another, whose parameters TRL copies. The
center of a router is a buffer, so it is copied here."""


class RouterLayer(BareTunerLayer):
    """A block's routers, one per adapter, as a child of the block (`milora_router`).

    The parts are in `ModuleDict`s by adapter, so PEFT finds, saves and switches them.

    Attributes:
        block: The block's path in the backbone.
        experts: Adapter -> the block's experts, in the order of the router's rows.
        settings: Adapter -> its configuration.
        trains_all_experts: Whether prompts choose all experts in training mode, except in `generate`.
    """

    adapter_layer_names = ("projection", "pooler", "activation")
    other_param_names = ("experts", "settings")
    _hook: Any

    def __init__(self, block: str, hidden_size: int, owner: ContextOwner) -> None:
        super().__init__()
        self.block = block
        self.hidden_size = hidden_size
        self.owner = owner
        self.projection = nn.ModuleDict()
        self.pooler = nn.ModuleDict()
        self.activation = nn.ModuleDict()
        self.experts: dict[str, tuple[str, ...]] = {}
        self.settings: dict[str, MiLoraConfig] = {}
        self.trains_all_experts = False

    def update_layer(
        self, adapter: str, config: MiLoraConfig, experts: tuple[str, ...], activation: str, device: torch.device
    ) -> None:
        """Adds an adapter's router on the block's device (or on the meta device during building)."""
        orders = (config.rational_orders[0], config.rational_orders[1])
        self.projection[adapter] = RouterProjection(self.hidden_size, len(experts))
        self.pooler[adapter] = build_pooler(config.pooler, self.hidden_size, centered=config.router_norm == "centered")
        source = next((other for other, settings in self.settings.items() if settings is config), None)
        if adapter == TRL_REFERENCE and source is not None:
            self.pooler[adapter].load_state_dict(self.pooler[source].state_dict())
        self.activation[adapter] = build_activation(activation, orders)
        self.experts[adapter], self.settings[adapter] = experts, config
        if not any(parameter.is_meta for parameter in self.projection[adapter].parameters()):
            self._move_adapter_to_device_of_base_layer(adapter, device)

    def decide(self, adapter: str, hidden: Tensor, prompt: Tensor) -> Decision:
        """Routes (batch, tokens, hidden) under a (batch, tokens) mask of the prompts' tokens."""
        config = self.settings[adapter]
        assert config.router_norm is not None
        if config.router_window is not None:
            prompt = prompt & (prompt.cumsum(dim=1) <= config.router_window)
        # An offloaded router is loaded by its own hooks to the block's device.
        device = hidden.device if self.weight.is_meta else self.weight.device
        probabilities = expert_probabilities(
            hidden.to(device),
            prompt.to(device),
            self.pooler[adapter],  # type: ignore[arg-type]
            self.activation[adapter],
            self.projection[adapter],
            norm=config.router_norm,
        )
        experts = len(self.experts[adapter])
        is_dense = self.trains_all_experts and self.training and generation_of(self.owner) is None
        top_k = experts if is_dense else min(config.top_k, experts)
        return choose(probabilities, top_k, config.gate)

    def before_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's pre-forward hook: routes the running pass, unless it is already routed."""
        if torch.compiler.is_dynamo_compiling() or (self.disable_adapters and running(self.owner) is None):
            return None  # Disabled, and no request that began earlier is running.
        if args:
            return (self.route_block(block, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.route_block(block, kwargs["hidden_states"])}

    def recompute_in_context(self, block: nn.Module) -> None:
        """Makes gradient checkpointing recompute a block in the context of its own forward.

        Done before the first block runs: older versions of transformers recompute a block together with its hooks.
        """
        if is_checkpointed(block):
            checkpoint_in_context(block, self.owner, partial(self.route_block, block))

    def route_block(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Routes the running pass from the block's input, (batch, tokens, hidden), and returns that input.

        Raises:
            RuntimeError: If no pass is running.
        """
        context = running_pass(self.owner, self.block)
        if isinstance(context.prompts, PackedTokens):
            context.prompts.decide(self, hidden)
            return hidden
        prompts: RoutedPrompts = context.prompts
        if self.block in prompts.routed_blocks:
            return hidden
        prompts.routed_blocks.add(self.block)
        for adapter, rows in prompts.adapter_rows.items():
            experts, prompt = self.experts.get(adapter), prompts.prompt
            if experts is None:
                continue
            if prompts.forced is not None:
                decision = follow(prompts.forced, self.block, experts, rows, hidden.device)
            else:
                assert prompt is not None
                own = slice(None) if rows is None else rows
                decision = self.decide(adapter, hidden[own], prompt[own])
            gates, leaf = decision.gates, []
            if torch.is_grad_enabled() and is_checkpointed(block) and gates.requires_grad:
                gates = gates.detach().requires_grad_()
                leaf = [gates]
            selections = select(gates, decision.chosen, rows, prompts.rows)
            prompts.routings.setdefault(adapter, {})[self.block] = BlockRouting(experts, decision, selections)
            if torch.is_grad_enabled():
                idle = self._idle_parameters(block, adapter, selections, router=not decision.gates.requires_grad)
                if leaf or idle:
                    source = decision.gates if leaf else None
                    hidden = _RouteGradient.apply(hidden, source, leaf, *idle)  # type: ignore[no-untyped-call]
        return hidden

    def _idle_parameters(
        self, block: nn.Module, adapter: str, selections: list[Selection | None], *, router: bool
    ) -> list[nn.Parameter]:
        """The trained parameters of experts that no row chose, and of a router whose gates have no gradient."""
        selected = zip(self.experts[adapter], selections, strict=True)
        layers: list[Any] = [block.get_submodule(expert) for expert, selection in selected if selection is None]
        parts = [
            getattr(layer, name)[adapter]
            for layer in ([*layers, self] if router else layers)
            for name in layer.adapter_layer_names
            if adapter in getattr(layer, name)
        ]
        found = [each for part in parts for each in (part.parameters() if isinstance(part, nn.Module) else [part])]
        return [parameter for parameter in found if parameter.requires_grad]


class _RouteGradient(torch.autograd.Function):
    """The identity on a block's input, which passes gradients to tensors that the block's graph does not reach.

    Gates: under (reentrant) checkpointing a block cannot send a gradient to a tensor outside it other than its input.
    Its layers therefore read a detached leaf of the gates. When the gradient of the block's input is complete, the
    leaf's is too, and it is passed on here. The leaf is inside a list: as a direct argument, the graph of the first
    pass would wait for a gradient that never arrives.

    Idle parameters: those of experts that no row chose get a zero gradient. `None` would stall
    `DistributedDataParallel`, and leave optimisers without state for them.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gates: Tensor | None, leaf: list[Tensor], *idle: Tensor) -> Tensor:
        ctx.leaf = leaf
        ctx.idle = [(tensor.shape, tensor.dtype, tensor.device) for tensor in idle]
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        of_gates = None
        for leaf in ctx.leaf:
            # Removed, so a second backward pass through a retained graph does not count the first again.
            of_gates, leaf.grad = leaf.grad, None
            if of_gates is None:
                of_gates = torch.zeros_like(leaf)
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.idle]
        return gradients[0], of_gates, None, *zeros


def follow(
    route: Route, block: str, experts: tuple[str, ...], rows: list[int] | None, device: torch.device
) -> Decision:
    """A given route's decision for a block, in a router's format.

    Raises:
        MiLoraError: If the route does not contain the block or one of its experts.
    """
    if block not in route.blocks or not set(experts) <= set(route.experts):
        raise MiLoraError(
            f"The given route has the blocks {list(route.blocks[:2])}... with experts {list(route.experts)}; the "
            f"adapter has {block} with experts {list(experts)}. Use a route of the same adapter and backbone."
        )
    columns = [route.experts.index(expert) for expert in experts]
    picked = route if rows is None else route[rows]
    at = route.blocks.index(block)
    gates = picked.gates[at][:, columns].to(device)
    return Decision(gates, picked.probabilities[at][:, columns].to(device), gates != 0)


def add_routers(backbone: nn.Module, adapter: str, config: MiLoraConfig, owner: ContextOwner) -> None:
    """Adds an adapter's router to every block with experts, which `config` lists; creates missing router layers."""
    blocks = {block.path: block for block in find_blocks(backbone, config.blocks)}
    experts = config.experts if isinstance(config.experts, dict) else dict.fromkeys(blocks, config.experts or [])
    for index, (path, of_block) in enumerate(experts.items()):
        block = blocks[path]
        router = getattr(block.module, OWN_ROUTER, None)
        if router is None:
            router = RouterLayer(path, hidden_size(backbone, block), owner)
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
    """Removes routers and their hooks from their blocks; with `empty_only`, only those without an adapter."""
    for module in list(model.modules()):
        router = getattr(module, OWN_ROUTER, None)
        if isinstance(router, RouterLayer) and not (empty_only and router.experts):
            router._hook.remove()
            restore_checkpoint_function(module)
            delattr(module, OWN_ROUTER)


def chosen_modules(model: nn.Module, route: Route, adapter: str) -> dict[str, float]:
    """Path of each module that a route of one row chose -> its gate.

    Raises:
        MiLoraError: If the route is not of this adapter and backbone.
    """
    gates: dict[str, float] = {}
    for block, router in routers_of(model).items():
        experts = router.experts.get(adapter, ())
        if experts:
            of_block = follow(route, block, experts, None, torch.device("cpu")).gates[0].tolist()
            gates |= {f"{block}.{name}": gate for name, gate in zip(experts, of_block, strict=True) if gate != 0}
    return gates
