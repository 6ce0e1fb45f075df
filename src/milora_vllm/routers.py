"""Reads an adapter's routers in float32, and stores the routes that they decide."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from milora_core.errors import MiLoraError
from milora_core.routing import Router
from milora_vllm.adapter import AdapterFile

ROUTER = ".milora_router."
PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


class Route:
    """The modules that the adapter changes for one prompt.

    Args:
        gates: (layers, modules), float32: each module's gate, 0 if the module is not selected.
    """

    def __init__(self, gates: Tensor) -> None:
        self.gates = gates
        self._rows: dict[int, list[float]] = {}

    def release(self) -> None:
        """Discards the numbers cached by [`of_layer`] when no running request needs them."""
        self._rows.clear()

    def of_layer(self, layer: int) -> list[float]:
        """A layer's gates as numbers, after its router has decided. Only for a CPU, where reading them is free."""
        row = self._rows.get(layer)
        if row is None:
            row = self._rows[layer] = self.gates[layer].tolist()
        return row


@dataclass(frozen=True)
class LayerRouter:
    """The router of one layer, and its experts' columns in a [`Route`]."""

    router: Router
    columns: Tensor

    def decide(self, hidden: Tensor, gates: Tensor) -> None:
        """Routes one prompt.

        Args:
            hidden: (tokens, hidden): the block's input at the deciding tokens.
            gates: (modules), float32: the layer's row of a route, updated in place.
        """
        mask = torch.ones(1, hidden.shape[0], dtype=torch.bool, device=hidden.device)
        gates[self.columns] = self.router(hidden.contiguous().unsqueeze(0), mask).gates[0]


def read_routers(
    file: AdapterFile,
    places: Mapping[str, tuple[int, int]],
    name_of: Callable[[str], str],
    hidden_size: int,
    device: torch.device,
) -> dict[int, LayerRouter]:
    """Reads an adapter's routers, by layer.

    Args:
        file: The adapter.
        places: Path of each linear module in vLLM's model (each slice of a packed module) -> its layer and its column.
        name_of: Maps a path in the Hugging Face model to vLLM's path.
        hidden_size: Size of the blocks' hidden states.
        device: The blocks' device.

    Raises:
        MiLoraError: If the file cannot be read, does not fit the model, or has routers whose shapes differ from the
            configuration.
    """
    blocks = _router_tensors(file)
    routers: dict[int, LayerRouter] = {}
    activation = file.config["router_activation"]
    for index, (block, tensors) in enumerate(blocks.items()):
        experts = _experts(file, block)
        found = [places.get(name_of(f"{block}.{expert}")) for expert in experts]
        if None in found:
            raise MiLoraError(
                f"vLLM has no LoRA layer for the expert {block}.{experts[found.index(None)]}: the adapter is for "
                "another backbone, or --lora-target-modules excludes the module."
            )
        layers = {place[0] for place in found if place is not None}
        if len(layers) != 1:
            raise MiLoraError(f"{file.folder}: the experts of {block} are in {len(layers)} blocks of vLLM's model.")
        of_block = activation if isinstance(activation, str) else activation[index]
        router = _router(file, block, tensors, hidden_size, len(experts), of_block).to(device)
        columns = torch.tensor([place[1] for place in found if place is not None], device=device)
        routers[layers.pop()] = LayerRouter(router, columns)
    return routers


def _router_tensors(file: AdapterFile) -> dict[str, dict[str, Tensor]]:
    """Path of each block -> its router's tensors, in block order."""
    path = file.folder / WEIGHTS
    if not path.is_file():
        raise MiLoraError(f"{file.folder} has no {WEIGHTS}; save the adapter as safetensors.")
    blocks: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (it is no mapping)
                block, is_router, part = name.removeprefix(PREFIX).partition(ROUTER)
                if is_router:
                    blocks.setdefault(block, {})[part] = weights.get_tensor(name).float()
    except SafetensorError as error:
        raise MiLoraError(f"{path} is truncated or not a safetensors file: {error}.") from error
    if not blocks:
        raise MiLoraError(
            f"{path} has no router, but its adapter_config.json has peft_type MILORA: save the adapter again."
        )
    return dict(sorted(blocks.items(), key=lambda item: [int(number) for number in re.findall(r"\d+", item[0])]))


def _experts(file: AdapterFile, block: str) -> list[str]:
    experts: Any = file.config["experts"]
    if isinstance(experts, dict):
        if block not in experts:
            raise MiLoraError(f"{file.folder}: adapter_config.json lists no experts for {block}, which has a router.")
        experts = experts[block]
    return list(experts)


def _router(
    file: AdapterFile, block: str, tensors: dict[str, Tensor], hidden_size: int, experts: int, activation: str
) -> Router:
    config = file.config
    norm = config.get("router_norm")
    if norm is None:  # saved before the field existed
        norm = "pooled" if config.get("normalize_router_input") else "none"
    router = Router(
        hidden_size,
        experts,
        top_k=min(config["top_k"], experts),
        pooler=config["pooler"],
        activation=activation,
        rational_orders=tuple(config["rational_orders"]),
        gate=config["gate"],
        norm=norm,
    )
    try:
        router.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise MiLoraError(f"{file.folder / WEIGHTS}: the router of {block} does not fit: {reason}") from error
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise MiLoraError(f"{file.folder / WEIGHTS}: the router of {block} has NaN or infinity.")
    return router.eval().requires_grad_(False)
