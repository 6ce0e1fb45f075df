"""Times a call on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def timed(run: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    """A function that runs `run` and returns the seconds.

    On a GPU the run is captured into a CUDA graph, as in a compiled decode step, so the launch cost is not included.

    Args:
        run: The function to time. It is first run once without timing.
        device: The device it runs on.
    """
    run()
    if device.type != "cuda":

        def run_timed() -> float:
            started = time.perf_counter()
            run()
            return time.perf_counter() - started

        return run_timed
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replayed() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1000

    return replayed
