"""DoRA's column norms in inference: what depends on the weights alone is worked out once an adapter, not a token."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from torch import Tensor

ROWS_AT_ONCE = 1024
"""Rows of the weight that are adapted at a time: the whole would be a second copy of it, in the adapter's precision."""


class _Known(NamedTuple):
    made_of: tuple[Any, ...]
    scale: Tensor


_scales: WeakKeyDictionary[LoraLayer, dict[str, _Known]] = WeakKeyDictionary()


def dora_scale(layer: LoraLayer, adapter: str) -> Tensor:
    """`m / ||W + s B A||`, the factor that DoRA gives to each output of a layer (Liu et al. 2024, equation 5).

    It is kept as long as the tensors it is made of are the same objects, unchanged as torch counts changes. Writing
    through `.data` is not counted; `model.train()` forgets what is kept, as it does with PEFT's `DoraCaching`.

    Args:
        layer: A LoRA layer of PEFT with DoRA.
        adapter: The adapter's name.

    Returns:
        (d_out), of the type of `lora_A`; a constant for the gradient.
    """
    base = layer.get_base_layer()
    parts = (
        base.weight if hasattr(base, "weight") else base.W_q,  # HQQ's
        layer.lora_A[adapter].weight,
        layer.lora_B[adapter].weight,
        layer.lora_magnitude_vector[adapter].weight,
    )
    if any(part.is_inference() for part in parts):
        return _compute(layer, adapter)
    versions = [(ref(part), part.data_ptr(), part._version) for part in parts]
    made_of = (*versions, layer.scaling[adapter])
    of_layer = _scales.setdefault(layer, {})
    known = of_layer.get(adapter)
    if known is None or known.made_of != made_of:
        known = of_layer[adapter] = _Known(made_of, _compute(layer, adapter))
    return known.scale


def forget_dora_scales(layer: LoraLayer) -> None:
    """Forgets what [`dora_scale`] has kept for a layer."""
    _scales.pop(layer, None)


@torch.no_grad()
def _compute(layer: LoraLayer, adapter: str) -> Tensor:
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    base = transpose(dequantize_module_weight(layer.get_base_layer()), getattr(layer, "fan_in_fan_out", False))
    norms = [
        torch.linalg.vector_norm(rows.to(a.device, torch.float32) + layer.scaling[adapter] * (up @ a).float(), dim=1)
        for rows, up in zip(base.split(ROWS_AT_ONCE), b.split(ROWS_AT_ONCE), strict=True)
    ]
    magnitude: Tensor = layer.lora_magnitude_vector[adapter].weight
    return (magnitude.float() / torch.cat(norms)).to(a.dtype)
