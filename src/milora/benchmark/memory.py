"""How much memory a method needs, apart from what others keep in the same process."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.autograd.profiler import profile

from milora.benchmark.sharing import tensor_bytes

ALLOCATION = "[memory]"
"""What torch's profiler calls an allocation (or, with a negative size, a release)."""


@contextmanager
def only_new_objects() -> Iterator[None]:
    """Lets the garbage collector, and so [`live_bytes`], look only at objects made from here on.

    Imported libraries are hundreds of thousands of objects, and a collection comes before every measurement.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def live_bytes(device: torch.device) -> int:
    """Bytes of the tensors on a device: torch's own count on a GPU, those that the collector can see on a CPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    # By type and not by isinstance, which asks proxies of other libraries for their class and may wake them.
    found = [item for item in gc.get_objects() if issubclass(type(item), Tensor) and not isinstance(item, FakeTensor)]
    return tensor_bytes(item for item in found if item.device.type == device.type and item.layout == torch.strided)


def peak_growth(run: Callable[[], Any], device: torch.device) -> int:
    """The most bytes of tensors that `run` had at one time on top of those that existed before.

    On a GPU it is what torch's allocator says. On a CPU every allocation and release of torch's allocator is recorded
    by its profiler, and summed: unlike the process's resident set, that is the same every time, and holds nothing of
    the freed memory that the C library keeps. Scratch memory that oneDNN and MKL allocate for themselves is not in it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    # Kineto announces itself on standard error otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(profile_memory=True) as recorded:
        run()
    # Read where the profiler leaves them: its own summary in Python takes minutes for as many operations.
    allocations = [
        (event.start_ns(), event.nbytes())
        for event in recorded.kineto_results.events()
        if event.name() == ALLOCATION and event.device_type() == DeviceType.CPU
    ]
    allocations.sort(key=lambda allocation: allocation[0])
    now = peak = 0
    for _, size in allocations:
        now += size
        peak = max(peak, now)
    return peak
