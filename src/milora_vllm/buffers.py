"""LoRA with gates on a GPU. The step's slots and gates are in fixed buffers on the device, so the host never waits.

The tests run this module on a CPU, where the same operators have other kernels.
"""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor

from milora_core.kernels import add_grouped_lora
from milora_vllm.batch import Rows


class Buffers:
    """Each row's adapter slot and gates.

    Args:
        layers: Number of blocks.
        modules: Number of linear modules per block, counting each slice of a packed module.
        tokens: Maximum number of tokens per step.
        few: Maximum number of rows for which a step uses the kernel for single tokens: the maximum number of requests.
        device: The model's device.
    """

    def __init__(self, layers: int, modules: int, tokens: int, few: int, device: torch.device) -> None:
        self.few = few
        self.slots = torch.full((tokens,), -1, dtype=torch.int32, device=device)
        self.gates = torch.zeros(layers, modules, tokens, dtype=torch.float32, device=device)
        self._filled: list[Rows] = []

    def fill(self, rows: list[Rows]) -> None:
        """Writes the slots and gates of a step. Rows without an adapter get slot -1 and gate 0."""
        if rows == self._filled:
            return
        slots = numpy.full(len(self.slots), -1, dtype=numpy.int32)
        places = numpy.zeros(len(self.slots), dtype=numpy.int64)
        routes = [torch.zeros_like(self.gates[:, :, 0])]
        for part in rows:
            slots[part.first : part.end] = part.slot
            places[part.first : part.end] = len(routes)
            routes.append(part.route.gates)
        self.slots.copy_(_moved(slots, self.slots.device), non_blocking=True)
        of_rows = torch.stack(routes, dim=-1).index_select(2, _moved(places, self.slots.device))
        self.gates.copy_(of_rows)
        # Keeping the routes alive ensures that no new route compares equal to an old one.
        self._filled = list(rows)

    def decided(self, layer: int, rows: list[Rows]) -> None:
        """Writes a layer's gates after its router has decided."""
        for part in rows:
            self.gates[layer, :, part.first : part.end] = part.route.gates[layer][:, None]


def _moved(values: Any, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class BufferedLinear:
    """Replaces the punica wrapper of a linear module; see [`milora_vllm.linear.GatedLinear`].

    A step with few rows, such as a decode step, uses milora's grouped kernel with one row per token. It skips the
    weights of rows with gate 0. A larger step uses vLLM's kernels and multiplies the output of A, in float32, by the
    gates.

    Args:
        wrapped: vLLM's punica wrapper.
        layer: The block's row in a route.
        columns: The columns of the module's slices in a route.
        buffers: The step's slots and gates.
    """

    def __init__(self, wrapped: Any, layer: int, columns: tuple[int, ...], buffers: Buffers) -> None:
        self._wrapped = wrapped
        self._buffers = buffers
        # The slices of a packed module are adjacent, so this is a view.
        self._gates = buffers.gates[layer, columns[0] : columns[-1] + 1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a: tuple[Tensor, ...],
        lora_b: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """See vLLM's `PunicaWrapperBase`."""
        tokens = x.shape[0]
        gates = self._gates[:, :tokens]
        if tokens > self._buffers.few:
            low = torch.zeros(len(lora_a), tokens, lora_b[0].shape[-1], dtype=torch.float32, device=x.device)
            self._wrapped.add_shrink(low, x, lora_a, scale, **kwargs)
            low *= gates[:, :, None]
            self._wrapped.add_expand(y, low, lora_b, output_slices, add_inputs=add_inputs, **kwargs)
            return
        if not add_inputs:
            y.zero_()
        start = 0
        for place, (a, b, size) in enumerate(zip(lora_a, lora_b, output_slices, strict=True)):
            target = y[:, None, start : start + size]
            weights = gates[place] if scale == 1 else gates[place] * scale
            add_grouped_lora(target, x[:, None], self._buffers.slots[:tokens], weights, a[:, 0], b[:, 0])
            start += size
