"""Fingerprints of models and runs by their contents, so results of different models or runs are never mixed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

SAMPLE = 16
"""Numbers sampled from each parameter of a backbone. Training changes all numbers, so a sample suffices, and reading a
whole backbone takes long."""

_PLACES = frozenset({"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"})
"""Fields of an adapter's configuration that do not affect its outputs."""


def model_fingerprint(model: Any, adapters: Iterable[str] | None = None) -> str:
    """A digest of what determines a model's outputs: its complete adapters and a sample of the backbone's weights.

    The model's location, device and file names are not included; the weights' dtype is.

    Args:
        model: A causal language model, with or without adapters.
        adapters: The names of the used adapters; by default the active one.
    """
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(model, PeftModel):
        for adapter in [model.active_adapter] if adapters is None else adapters:
            values = model.peft_config[adapter].to_dict()
            settings = {name: value for name, value in values.items() if name not in _PLACES}
            digest.update(json.dumps(settings, sort_keys=True, default=_stable).encode())
            # Without this option PEFT queries the hub to decide whether to save resized embeddings.
            tensors = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
            for name, tensor in sorted(tensors.items()):
                digest.update(name.encode())
                digest.update(_bytes(tensor))
        model = model.get_base_model()
    config = getattr(model, "config", None)
    digest.update(str(getattr(config, "model_type", type(model).__name__)).encode())
    for parameter in model.parameters():
        digest.update(_bytes(parameter.detach().flatten()[:SAMPLE]))
    return digest.hexdigest()


def run_fingerprint(settings: Mapping[str, Any], model: str) -> str:
    """A digest of a run. A later run with the same digest may reuse its outputs.

    Args:
        settings: All JSON settings that determine the outputs besides the weights: the task or the question, the
            decoding, and the seed when sampling.
        model: The [`model_fingerprint`] of the model.
    """
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8)
    digest.update(model.encode())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _stable(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
