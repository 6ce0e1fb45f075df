"""Copies a backbone's modules without its weights, so that many methods share one backbone in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from milora.tuners.generate_options import forget_compiled_step


def shared_copy(backbone: nn.Module, own: Iterable[nn.Module] = ()) -> Any:
    """A copy of a model's modules whose parameters and buffers are the model's tensors.

    Adapters in the copy do not change the model: it gets no wrapped modules and no hooks. The copy's class is a new
    subclass of the model's class. torch.compile reuses a graph for models of the same class without comparing their
    hooks, and would ignore an adapter that consists of hooks.

    Args:
        backbone: The model to copy.
        own: Modules whose parameters are copied instead of shared.
    """
    owned = {id(parameter) for module in own for parameter in module.parameters()}
    shared = {id(tensor): tensor for tensor in _tensors(backbone) if id(tensor) not in owned}
    copied = copy.deepcopy(backbone, memo=shared)
    kind = type(backbone)
    copied.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})
    forget_compiled_step(copied)
    return copied


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages. Each storage counts once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return tensor_bytes(_tensors(model))


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
