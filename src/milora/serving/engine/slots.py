"""The places of adapters in the model: PEFT's layers for each, which an adapter of the same shapes can take over."""

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
from milora_core.kernels.native import library

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
    """The backbone as a MiLoRA model of PEFT, without requests' adapters at first.

    PEFT takes 0.3 s and more to add an adapter to a model of 30 blocks, and the longer the more it has. An adapter
    whose configuration and tensors have the shapes of one that goes is written into its place instead.

    Args:
        backbone: The model, which gets PEFT's layers.
        most: How many adapters there are at most.

    Attributes:
        model: The backbone with PEFT's layers.
        packed: The adapters for the native kernel; `None` where there is none.
    """

    def __init__(self, backbone: Any, most: int) -> None:
        # It stays the active adapter, as PEFT cannot wrap whole modules while there is none; no request uses it.
        self.model: PeftModel = get_peft_model(backbone, MiLoraConfig(r=1, top_k=1), adapter_name="empty").eval()
        is_native = backbone.device.type == "cpu" and library() is not None
        self.packed = PackedModules(backbone, most) if is_native else None
        self._numbers = itertools.count()
        self._shapes: dict[str, Hashable] = {}
        self._tensors: dict[str, dict[str, Tensor]] = {}

    @property
    def owner(self) -> GroupedOwner:
        """The owner of the model's contexts."""
        owner: GroupedOwner = self.model.base_model.owner
        return owner

    def close(self) -> None:
        """Takes all adapters and PEFT's layers out of the backbone."""
        self.model.unload()

    def shapes(self, adapter: Adapter) -> Hashable:
        """The shapes ([`shapes_of`]) of an adapter that is in memory."""
        return self._shapes[adapter.slot]

    def make(self, adapter: Adapter) -> None:
        """Adds an adapter to the model.

        Raises:
            MiLoraError: If it cannot be added; the model is then as before.
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
        """Writes an adapter's weights into the place of another one of the same shapes.

        Raises:
            MiLoraError: If the file holds NaN or infinity. The other adapter then keeps its place.
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
            self.packed.remove(slot)  # Its factors are worked out from the weights.
            self.packed.add(slot)

    def clear(self, adapter: Adapter) -> None:
        """Takes an adapter out of the model."""
        slot = adapter.slot
        if self.packed is not None:
            self.packed.remove(slot)
        self.model.delete_adapter(slot)
        del self._shapes[slot]
        self._tensors.pop(slot, None)


def shapes_of(adapter: Adapter) -> Hashable:
    """What adapters have in common of which one can take over the other's place.

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
