"""Measures a method's memory separately from other methods in the same process."""

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
"""The name of an allocation (or, with a negative size, a release) in torch's profiler."""


@contextmanager
def only_new_objects() -> Iterator[None]:
    """Limits the garbage collector, and thus [`live_bytes`], to objects created inside this context.

    Imported libraries have hundreds of thousands of objects, and every measurement starts with a collection.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def live_bytes(device: torch.device) -> int:
    """Bytes of the tensors on a device: torch's count on a GPU, the collector's tensors on a CPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    # `isinstance` would access `__class__` of other libraries' proxies and may load them, so this checks the type.
    found = [item for item in gc.get_objects() if issubclass(type(item), Tensor) and not isinstance(item, FakeTensor)]
    return tensor_bytes(item for item in found if item.device.type == device.type and item.layout == torch.strided)


def peak_growth(run: Callable[[], Any], device: torch.device) -> int:
    """The peak growth, in bytes, of tensor memory during `run`.

    On a GPU torch's allocator reports it. On a CPU torch's profiler records every allocation and release of torch's
    allocator, and their sum is used. Unlike the process's resident set, it is reproducible and excludes freed memory
    that the C library keeps. Scratch memory allocated by oneDNN and MKL is not included.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    # Without this, Kineto writes messages to standard error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(profile_memory=True) as recorded:
        run()
    # Reads the raw events: the profiler's summary in Python takes minutes for this many operations.
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
