"""A block's router as a layer that PEFT keeps, saves and switches: it decides, or follows a given route."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from milora.tuners.bare_layer import BareTunerLayer
from milora.tuners.checkpointing import checkpoint_with_pass, is_checkpointed
from milora.tuners.milora.config import MiLoraConfig
from milora.tuners.milora.dispatch import Dispatcher
from milora.tuners.milora.gradient import RouteGradient
from milora.tuners.milora.routing_pass import RoutingPass
from milora.tuners.milora.selection import BlockRouting, Selection, select
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


class RouterLayer(BareTunerLayer):
    """A block's routers, one an adapter, as a child of the block (`milora_router`).

    The parts lie in `ModuleDict`s by adapter, which is how PEFT finds, saves and switches them.

    Args:
        block: The block's path in the backbone.
        hidden_size: Size of the block's hidden states.
        dispatcher: Where decisions are written to.
    """

    adapter_layer_names = ("projection", "pooler", "activation")
    other_param_names = ("experts", "top_k", "gate", "norm")
    _hook: Any

    def __init__(self, block: str, hidden_size: int, dispatcher: Dispatcher) -> None:
        super().__init__()
        self.block = block
        self.hidden_size = hidden_size
        self.dispatcher = dispatcher
        self.projection = nn.ModuleDict()
        self.pooler = nn.ModuleDict()
        self.activation = nn.ModuleDict()
        self.experts: dict[str, tuple[str, ...]] = {}
        self.top_k: dict[str, int] = {}
        self.gate: dict[str, str] = {}
        self.norm: dict[str, str] = {}

    def update_layer(
        self, adapter: str, config: MiLoraConfig, experts: tuple[str, ...], activation: str, device: torch.device
    ) -> None:
        """Adds an adapter's router, on the device of the block (or left on the meta device it is being built on)."""
        orders = (config.rational_orders[0], config.rational_orders[1])
        self.projection[adapter] = RouterProjection(self.hidden_size, len(experts))
        self.pooler[adapter] = build_pooler(config.pooler, self.hidden_size, centered=config.router_norm == "centered")
        self.activation[adapter] = build_activation(activation, orders)
        self.experts[adapter] = experts
        self.top_k[adapter] = min(config.top_k, len(experts))
        self.gate[adapter] = config.gate
        assert config.router_norm is not None
        self.norm[adapter] = config.router_norm
        if not any(parameter.is_meta for parameter in self.projection[adapter].parameters()):
            self._move_adapter_to_device_of_base_layer(adapter, device)

    def decide(self, adapter: str, hidden: Tensor, prompt: Tensor) -> Decision:
        """Routes (batch, tokens, hidden) under a (batch, tokens) mask of the prompts' tokens."""
        projection = self.projection[adapter]
        # Offloaded, a router is loaded by its own hooks, to where the block computes.
        device = hidden.device if self.weight.is_meta else self.weight.device
        probabilities = expert_probabilities(
            hidden.to(device),
            prompt.to(device),
            self.pooler[adapter],  # type: ignore[arg-type]
            self.activation[adapter],
            projection,
            norm=self.norm[adapter],
        )
        return choose(probabilities, self.top_k[adapter], self.gate[adapter])

    def before_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's pre-forward hook: routes the pass that is running, unless that has been done."""
        if self.disable_adapters or (torch.compiler.is_dynamo_compiling() and self.dispatcher.is_compiled):
            return None
        if args:
            return (self.route_block(block, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.route_block(block, kwargs["hidden_states"])}

    def route_block(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Decides for the running pass from the block's input, (batch, tokens, hidden), and returns that input.

        Raises:
            RuntimeError: If no pass is running.
        """
        routing_pass = self.dispatcher.current
        if routing_pass is None:
            raise RuntimeError(
                f"{self.block} was called on its own: which tokens are the prompt is read where the whole model is "
                "called. Call the model that get_peft_model returned."
            )
        if self.block in routing_pass.routed_blocks:
            return hidden
        routing_pass.routed_blocks.add(self.block)
        for adapter, rows in routing_pass.adapter_rows.items():
            if adapter in self.projection:
                hidden = self._route(block, adapter, rows, routing_pass, hidden)
        return hidden

    def _route(
        self, block: nn.Module, adapter: str, rows: list[int] | None, routing_pass: RoutingPass, hidden: Tensor
    ) -> Tensor:
        experts = self.experts[adapter]
        if routing_pass.forced is not None:
            decision = follow(routing_pass.forced, self.block, experts, rows, hidden.device)
        else:
            assert routing_pass.prompt is not None
            prompt = routing_pass.prompt
            decision = self.decide(
                adapter, hidden if rows is None else hidden[rows], prompt if rows is None else prompt[rows]
            )
        gates = decision.gates
        leaf: list[Tensor] = []
        if torch.is_grad_enabled() and is_checkpointed(block):
            checkpoint_with_pass(block, self.dispatcher, _Rerouted(self, block))
            if gates.requires_grad:
                gates = gates.detach().requires_grad_()
                leaf = [gates]
        selections = select(gates, decision.chosen)
        routing_pass.routings.setdefault(adapter, {})[self.block] = BlockRouting(experts, decision, selections)
        if torch.is_grad_enabled():
            idle = self._idle_parameters(block, adapter, selections, router=not decision.gates.requires_grad)
            if leaf or idle:
                source = decision.gates if leaf else None
                hidden = RouteGradient.apply(hidden, source, leaf, *idle)  # type: ignore[no-untyped-call]
        return hidden

    def _idle_parameters(
        self, block: nn.Module, adapter: str, selections: list[Selection | None], *, router: bool
    ) -> list[nn.Parameter]:
        layers = [
            block.get_submodule(expert)
            for expert, selection in zip(self.experts[adapter], selections, strict=True)
            if selection is None
        ]
        if router:
            layers.append(self)
        return [
            parameter
            for layer in layers
            for name in layer.adapter_layer_names  # type: ignore[union-attr]
            if adapter in getattr(layer, name)
            for parameter in _parameters(getattr(layer, name)[adapter])
            if parameter.requires_grad
        ]


def follow(
    route: Route, block: str, experts: tuple[str, ...], rows: list[int] | None, device: torch.device
) -> Decision:
    """What a given route says for a block, as a router would have said it.

    Raises:
        MiLoraError: If the route does not know the block or one of its experts.
    """
    if block not in route.blocks or not set(experts) <= set(route.experts):
        raise MiLoraError(
            f"The route in force is for the blocks {list(route.blocks[:2])}... with experts {list(route.experts)}; the "
            f"adapter has {block} with experts {list(experts)}. Use a route of the same adapter and backbone."
        )
    columns = [route.experts.index(expert) for expert in experts]
    picked = route if rows is None else route[rows]
    at = route.blocks.index(block)
    gates = picked.gates[at][:, columns].to(device)
    return Decision(gates, picked.probabilities[at][:, columns].to(device), gates != 0)


class _Rerouted:
    """Routes a given block: a callable with attributes, so that models that hold it can be copied and pickled."""

    def __init__(self, router: RouterLayer, block: nn.Module) -> None:
        self.router, self.block = router, block

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.router.route_block(self.block, hidden)


def _parameters(value: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return [value] if isinstance(value, nn.Parameter) else list(value.parameters())
