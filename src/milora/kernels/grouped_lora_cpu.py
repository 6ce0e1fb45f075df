"""`grouped_lora` on a CPU: rows of one adapter are multiplied together, inactive rows not at all."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def add_grouped_lora_on_cpu(
    result: Tensor, x: Tensor, adapters: Tensor, gates: Tensor, lora_a: Tensor, lora_b: Tensor
) -> None:
    """See [`milora.kernels.grouped_lora.add_grouped_lora`].

    What lies between A and B has the type of the stacks; each product is accumulated in float32.

    Raises:
        IndexError: If a row's adapter is beyond the stacks.
    """
    x = x.to(lora_a.dtype)
    for adapter, rows, weights in _groups(adapters, gates):
        _add(result, x, rows, weights, lora_a[adapter], lora_b[adapter])


def _groups(adapters: Tensor, gates: Tensor) -> Iterator[tuple[int, list[int], list[float]]]:
    """Each adapter that is at work, with its rows and their gates."""
    groups: dict[int, tuple[list[int], list[float]]] = {}
    for row, (adapter, gate) in enumerate(zip(adapters.tolist(), gates.tolist(), strict=True)):
        if adapter >= 0 and gate != 0:
            rows, weights = groups.setdefault(adapter, ([], []))
            rows.append(row)
            weights.append(gate)
    return ((adapter, rows, weights) for adapter, (rows, weights) in groups.items())


def _add(result: Tensor, x: Tensor, rows: list[int], weights: list[float], a: Tensor, b: Tensor) -> None:
    first, count, tokens = rows[0], len(rows), x.shape[1]
    adjacent = rows[-1] - first + 1 == count
    # A view of adjacent rows (of one prompt's beams, or of a single row) is changed where it lies.
    part = x.narrow(0, first, count) if adjacent else x[rows]
    low = part.reshape(count * tokens, -1) @ a.t()
    if any(weight != weights[0] for weight in weights):
        low *= torch.tensor(weights).repeat_interleave(tokens)[:, None].to(low.dtype)
        weights = [1.0]
    target = result.narrow(0, first, count)
    if adjacent and result.is_contiguous() and result.dtype == b.dtype:
        target.view(count * tokens, -1).addmm_(low, b.t(), alpha=weights[0])
        return
    delta = (low @ b.t()).mul_(weights[0]).view(count, tokens, -1)
    if adjacent:
        target += delta
    else:
        result[rows] += delta.to(result.dtype)
