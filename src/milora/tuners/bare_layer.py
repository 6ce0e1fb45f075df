"""A tuner layer of PEFT without a base layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from milora_core.errors import MiLoraError


class BareTunerLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A `BaseTunerLayer` beside the backbone's modules instead of around one of them.

    PEFT finds, saves, switches and deletes the adapters' parts. They are in the `ModuleDict`s, by adapter, that
    `adapter_layer_names` lists.
    """

    # PEFT's attributes, declared here because PEFT's class has no annotations for a type checker.
    adapter_layer_names: tuple[str, ...]
    active_adapters: list[str]
    disable_adapters: bool
    set_adapter: Callable[..., None]
    delete_adapter: Callable[[str], None]

    def __init__(self) -> None:
        super().__init__()
        self.merged_adapters: list[str] = []

    def adapters(self) -> set[str]:
        """The adapters that have a part in this layer."""
        return {adapter for name in self.adapter_layer_names for adapter in getattr(self, name)}

    def get_base_layer(self) -> nn.Module:
        """Returns the layer itself, because it has no base layer."""
        return self

    @property
    def weight(self) -> Tensor:
        """One of the layer's parameters, from which PEFT reads device and dtype."""
        return next(self.parameters())

    @property
    def bias(self) -> None:
        """Always `None`: the layer has no bias."""
        return

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused.

        Raises:
            MiLoraError: Always.
        """
        raise MiLoraError(f"{type(self).__name__} cannot be merged into a weight of the backbone.")

    def unmerge(self) -> None:
        """Does nothing: the layer is never merged."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's method needs a base layer and casts to its dtype.
        if device is None:
            return
        for name in self.adapter_layer_names:
            parts: Any = getattr(self, name)
            if adapter_name in parts and not _is_on_meta(parts[adapter_name]):
                parts[adapter_name] = parts[adapter_name].to(device)


def _is_on_meta(part: nn.Module | Tensor) -> bool:
    return part.is_meta if isinstance(part, Tensor) else any(parameter.is_meta for parameter in part.parameters())
