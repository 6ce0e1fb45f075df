"""Many methods on one backbone in memory: copies of its modules that share its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from milora.tuners.generate_options import forget_compiled_step


def shared_copy(backbone: nn.Module, own: Iterable[nn.Module] = ()) -> Any:
    """A copy of a model's modules whose parameters and buffers are the same tensors as the model's.

    Adapters put into the copy leave the model itself as it was: it has no wrapped modules and no hooks. The copy is of
    a class of its own, below the model's: before torch.compile runs one model's graph for another, it compares their
    classes and not their hooks, and would leave out an adapter that consists of hooks.

    Args:
        backbone: The model to copy.
        own: Modules in it of whose parameters the copy gets its own.
    """
    owned = {id(parameter) for module in own for parameter in module.parameters()}
    shared = {id(tensor): tensor for tensor in _tensors(backbone) if id(tensor) not in owned}
    copied = copy.deepcopy(backbone, memo=shared)
    kind = type(backbone)
    copied.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})
    forget_compiled_step(copied)
    return copied


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of some tensors, each storage counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return tensor_bytes(_tensors(model))


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
