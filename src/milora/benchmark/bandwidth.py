"""Memory bandwidth of a device, as a reference for kernels and decode steps."""

from __future__ import annotations

import statistics

import torch

from milora.benchmark.timed import timed

COPIED_BYTES = {"cuda": 2**30, "cpu": 2**28}
"""Size of the copied buffer, much larger than every cache."""
COPIES = 5


class Copy:
    """Copies a large buffer at each call.

    Args:
        device: The device of the buffer.

    Attributes:
        bytes: Bytes read and written per copy.
    """

    def __init__(self, device: torch.device) -> None:
        self._source = torch.ones(COPIED_BYTES.get(device.type, COPIED_BYTES["cpu"]) // 4, device=device)
        self._target = torch.empty_like(self._source)
        self.bytes = 2 * self._source.nbytes

    def __call__(self) -> None:
        """Copies."""
        self._target.copy_(self._source)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy reads and writes, the median of several copies."""
    copy = Copy(device)
    run = timed(copy, device)
    return copy.bytes / statistics.median(run() for _ in range(COPIES))
