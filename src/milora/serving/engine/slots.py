"""Adapter slots in the model: each has PEFT's layers, which an adapter of the same shapes can reuse."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from dataclasses import fields
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from milora.inference.plain_lora import add_lora
from milora.serving.engine.adapter import Adapter
from milora.tuners.grouped import GroupedOwner
from milora.tuners.milora import MiLoraConfig
from milora.tuners.milora.packed_rows import PackedModules
from milora_core.errors import MiLoraError
from milora_core.kernels.packed_lora import packed_operator

NOT_OF_SHAPES = (
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
)
"""Fields of a configuration in which adapters of the same shapes may differ."""


class AdapterSlots:
    """The backbone as a PEFT model with MiLoRA, initially without requests' adapters.

    PEFT needs at least 0.3 s to add an adapter to a model with 30 blocks, and longer the more adapters the model has.
    If an evicted adapter has the same configuration and shapes, the new weights are copied into its slot instead.

    Args:
        backbone: The model. It gets PEFT's layers.
        most: Maximum number of adapters.

    Attributes:
        model: The backbone with PEFT's layers.
        packed: The adapters in the format of the device's kernel; `None` without a kernel.
    """

    def __init__(self, backbone: Any, most: int) -> None:
        # No request uses this adapter. PEFT cannot wrap whole modules without an active adapter.
        self.model: PeftModel = get_peft_model(backbone, MiLoraConfig(r=1, top_k=1), adapter_name="empty").eval()
        operator = packed_operator(backbone.device)
        self.packed = None if operator is None else PackedModules(backbone, most, backbone.device, operator)
        self._numbers = itertools.count()
        self._shapes: dict[str, Hashable] = {}
        self._tensors: dict[str, dict[str, Tensor]] = {}

    @property
    def owner(self) -> GroupedOwner:
        """The owner of the model's contexts."""
        owner: GroupedOwner = self.model.base_model.owner
        return owner

    def close(self) -> None:
        """Removes all adapters and PEFT's layers from the backbone."""
        self.model.unload()

    def shapes(self, adapter: Adapter) -> Hashable:
        """The shapes ([`shapes_of`]) of an adapter in memory."""
        return self._shapes[adapter.slot]

    def make(self, adapter: Adapter) -> None:
        """Adds an adapter to the model.

        Raises:
            MiLoraError: If it cannot be added. The model is then unchanged.
        """
        slot = f"adapter{next(self._numbers)}"
        try:
            if adapter.kind == "LORA":
                add_lora(self.model, slot, adapter.folder)
            else:
                self.model.load_adapter(str(adapter.folder), adapter_name=slot)
        except Exception:
            if slot in self.model.peft_config:
                self.model.delete_adapter(slot)
            raise
        self.model.eval()
        adapter.slot = slot
        self._shapes[slot] = shapes_of(adapter)
        if self.packed is not None:
            self.packed.add(slot)

    def take_over(self, adapter: Adapter, replaced: Adapter) -> None:
        """Copies an adapter's weights into the slot of another adapter of the same shapes.

        Raises:
            MiLoraError: If the file has NaN or infinity. The other adapter then keeps its slot.
        """
        slot = replaced.slot
        tensors = load_file(adapter.folder / SAFETENSORS_WEIGHTS_NAME)
        broken = next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None)
        if broken is not None:
            raise MiLoraError(f"The adapter's file has NaN or infinity in {broken}.")
        if slot not in self._tensors:
            self._tensors[slot] = get_peft_model_state_dict(self.model, adapter_name=slot)
        with torch.no_grad():
            for name, tensor in tensors.items():
                self._tensors[slot][name].copy_(tensor)
        adapter.slot = slot
        self.owner.identities.renew(slot)
        if self.packed is not None and adapter.config.use_dora:
            self.packed.remove(slot)  # DoRA's factors are computed from the weights.
            self.packed.add(slot)

    def clear(self, adapter: Adapter) -> None:
        """Removes an adapter from the model."""
        slot = adapter.slot
        if self.packed is not None:
            self.packed.remove(slot)
        self.model.delete_adapter(slot)
        del self._shapes[slot]
        self._tensors.pop(slot, None)


def shapes_of(adapter: Adapter) -> Hashable:
    """A key that is equal for two adapters if one can use the other's slot.

    Raises:
        OSError: If the adapter's file cannot be read.
    """
    config = adapter.config
    settings = {field.name: getattr(config, field.name, None) for field in fields(config)}
    settings = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in settings.items()
        if name not in NOT_OF_SHAPES
    }
    with safe_open(adapter.folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
        names = sorted(file.keys())
        tensors = tuple((name, tuple(file.get_slice(name).get_shape())) for name in names)
    return adapter.kind, repr(sorted(settings.items(), key=lambda item: item[0])), tensors
