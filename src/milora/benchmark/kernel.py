"""`milora bench kernel`: compares the operator for rows with different adapters with its reference and byte count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from milora.benchmark.bandwidth import Copy
from milora.benchmark.result import GIGA, Result
from milora.benchmark.rounds import Progress, compared, spread_fields
from milora.benchmark.session import Record
from milora.benchmark.settings import Settings, check_at_least
from milora.benchmark.timed import timed
from milora_core.kernels import add_grouped_lora, grouped_lora_reference

OPERATOR, REFERENCE, COPY = "operator", "reference", "copy"
COLD_BYTES = 2**28
"""Minimum total size of the stacks that calls use in turn. No stack then stays in a cache."""


@dataclass(frozen=True)
class KernelSettings(Settings):
    """The settings of a kernel benchmark.

    Args:
        batches: Numbers of rows, each measured separately. Each row has its own adapter.
        d_in: Size of the module's input.
        d_out: Size of its output.
        rank: Rank of the adapters.
        active: One row in `active` selects the module; 1 means all rows.
        calls: Number of calls per measurement.

    Raises:
        MiLoraError: If a value is out of range.
    """

    batches: tuple[int, ...] = (1, 8, 32, 64)
    d_in: int = 4096
    d_out: int = 4096
    rank: int = 32
    active: int = 2
    calls: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batches", "d_in", "d_out", "rank", "active", "calls"):
            check_at_least(name, getattr(self, name), 1)


@dataclass(frozen=True)
class _Calls:
    """Arguments of calls, each with stacks at a different memory location."""

    x: Tensor
    adapters: Tensor
    gates: Tensor
    stacks: list[tuple[Tensor, Tensor]]
    result: Tensor

    @property
    def bytes(self) -> int:
        """Bytes that one call must read and write: A, B, inputs and outputs of the rows that selected the module."""
        rows = int((self.gates != 0).sum())
        lora_a, lora_b = self.stacks[0]
        weights = lora_a[0].nbytes + lora_b[0].nbytes
        return rows * (weights + self.x[0].nbytes + 2 * self.result[0].nbytes)


def kernel(settings: KernelSettings, progress: Progress = lambda line: None) -> Result:
    """Measures the operator as a decode step calls it, with one token per row.

    On a GPU the calls are captured into a CUDA graph, see [`timed`]. The same rounds also measure the device's
    bandwidth, with a copy of a large buffer.

    Args:
        settings: What to measure.
        progress: Called with progress messages.
    """
    settings = settings.resolved()
    record = Record(settings, progress)
    device = record.device
    copy = Copy(device)
    for batch in settings.batches:
        calls = _make(settings, batch, device)
        lora_a, lora_b = calls.stacks[0]
        expected = grouped_lora_reference(calls.result, calls.x, calls.adapters, calls.gates, lora_a, lora_b)
        found = add_grouped_lora(calls.result.clone(), calls.x, calls.adapters, calls.gates, lora_a, lora_b)
        error = ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()
        runs = {
            OPERATOR: timed(_calling(add_grouped_lora, calls, settings.calls), device),
            REFERENCE: timed(_calling(grouped_lora_reference, calls, settings.calls), device),
            COPY: timed(copy, device),
        }
        for run in runs.values():
            for _ in range(settings.warmups):
                run()
        samples = record.in_turn(f"batch {batch}", list(runs), lambda name, runs=runs: runs[name](), _seconds)  # type: ignore[misc]
        per_call = {
            name: [seconds / (1 if name == COPY else settings.calls) for seconds in of] for name, of in samples.items()
        }
        bandwidth = [copy.bytes / seconds for seconds in per_call[COPY]]
        for name, seconds in per_call.items():
            moved = copy.bytes if name == COPY else calls.bytes
            speeds = [moved / each for each in seconds]
            shares = [speed / limit for speed, limit in zip(speeds, bandwidth, strict=True)]
            record.rows.append(
                {
                    "method": name,
                    "batch": batch,
                    **spread_fields("microseconds", [each * 1e6 for each in seconds]),
                    **compared(per_call, name),
                    "bytes": moved,
                    **spread_fields("gigabytes_per_second", [speed / GIGA for speed in speeds]),
                    **spread_fields("share_of_bandwidth", shares),
                    "largest_error": error if name == OPERATOR else None,
                }
            )
    return record.result("kernel")


def _make(settings: KernelSettings, batch: int, device: torch.device) -> _Calls:
    generator = torch.Generator(device).manual_seed(settings.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(settings.torch_dtype)

    stack_bytes = batch * settings.rank * (settings.d_in + settings.d_out) * settings.torch_dtype.itemsize
    number = min(settings.calls, -(-COLD_BYTES // stack_bytes))
    gates = torch.zeros(batch, device=device)
    gates[:: settings.active] = 2.0
    return _Calls(
        x=draw(batch, 1, settings.d_in),
        adapters=torch.arange(batch, device=device, dtype=torch.int32),
        gates=gates,
        stacks=[
            (draw(batch, settings.rank, settings.d_in), draw(batch, settings.d_out, settings.rank))
            for _ in range(number)
        ],
        result=draw(batch, 1, settings.d_out),
    )


def _calling(function: Callable[..., Tensor], calls: _Calls, number: int) -> Callable[[], Any]:
    def run() -> None:
        for index in range(number):
            lora_a, lora_b = calls.stacks[index % len(calls.stacks)]
            function(calls.result, calls.x, calls.adapters, calls.gates, lora_a, lora_b)

    return run


def _seconds(sample: float) -> str:
    return f"{sample * 1e3:.3f} ms"
