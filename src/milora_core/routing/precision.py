"""Modules whose parameters stay in float32 when the model is cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class KeepFloat32(nn.Module):
    """A module that follows its model to other devices, but not to other floating-point types.

    `model.to(torch.bfloat16)` or `model.half()` would round a router's weights, and with them its decisions.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def on_device_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.is_floating_point() and moved.dtype != tensor.dtype:
                # From the original, so nothing is rounded in between.
                return tensor.to(moved.device)
            return moved

        return super()._apply(on_device_only, recurse)  # type: ignore[no-untyped-call]
