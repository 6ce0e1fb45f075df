"""The common setup and summary of all benchmarks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Generic

import torch

from milora.benchmark.bandwidth import copy_bandwidth
from milora.benchmark.compiling import room_for_graphs
from milora.benchmark.environment import environment
from milora.benchmark.memory import live_bytes, only_new_objects, peak_growth
from milora.benchmark.methods import MeasuredMethod, build_backbone
from milora.benchmark.result import GIGA, MIB, Result
from milora.benchmark.rounds import Progress, Sample, Turn, compared, compared_memory, in_turn, spread_fields
from milora.benchmark.settings import Settings
from milora.benchmark.sharing import model_bytes

Build = Callable[[str, Any, Settings], MeasuredMethod]
"""Builds a method from its name, the backbone and the settings."""


@dataclass(frozen=True)
class Prepared:
    """A method and its memory.

    Attributes:
        method: The method, ready to run.
        kept: Bytes that it keeps besides the backbone: its adapters and caches from its first use.
    """

    method: MeasuredMethod
    kept: int


@dataclass(frozen=True)
class Measured(Generic[Sample]):
    """The results of a case.

    Attributes:
        samples: By method, one sample per round.
        memory: By method, the peak in MiB.
    """

    samples: Mapping[str, list[Sample]]
    memory: Mapping[str, float]

    def fields(self, name: str, key: str, value: Callable[[Sample], float]) -> dict[str, Any]:
        """The fields of a row: a value's spread as `key`, its ratios to other methods, and the peak memory."""
        values = {method: [value(sample) for sample in samples] for method, samples in self.samples.items()}
        return {**spread_fields(key, values[name]), **compared(values, name), **compared_memory(self.memory, name)}

    def median(self, name: str, value: Callable[[Sample], float]) -> float:
        """The median of a value over the rounds of one method."""
        return statistics.median(value(sample) for sample in self.samples[name])


class Record:
    """The measurements of a benchmark so far, and their order.

    Args:
        settings: Resolved.
        progress: Called with the progress.
    """

    def __init__(self, settings: Settings, progress: Progress) -> None:
        self.settings = settings
        self.progress = progress
        self.device = torch.device(settings.device or "cpu")
        self.rows: list[dict[str, Any]] = []
        self.order: list[Turn] = []
        self.environment = environment(self.device)

    def in_turn(
        self,
        case: str,
        names: Sequence[str],
        measure: Callable[[str], Sample],
        describe: Callable[[Sample], str] = str,
        value: Callable[[Sample], float] | None = None,
    ) -> Mapping[str, list[Sample]]:
        """Samples by name; see [`milora.benchmark.rounds.in_turn`]."""
        measured = in_turn(case, names, self.settings.rounds, measure, self.progress, describe, value)
        self.order += measured.order
        return measured.samples

    def result(self, command: str) -> Result:
        """The result of all measurements."""
        after = environment(self.device)["load_average"]
        return Result(
            command,
            self.settings.to_dict(),
            self.rows,
            self.order,
            {**self.environment, "load_average_after": after},
        )


class Session(Record):
    """One backbone in memory and the methods around it.

    Args:
        settings: Resolved.
        progress: Called with the progress.
    """

    def __init__(self, settings: Settings, progress: Progress) -> None:
        super().__init__(settings, progress)
        depth = "" if settings.layers is None else f", {settings.layers} blocks"
        progress(f"building {settings.backbone}{depth}, in {settings.dtype}")
        self.backbone = build_backbone(settings)
        self.backbone_bytes = model_bytes(self.backbone)

    @cached_property
    def copy_bandwidth(self) -> float:
        """Bytes per second of a copy on the device, measured once and added to the environment."""
        self.progress("measuring the bandwidth")
        found = copy_bandwidth(self.device)
        self.environment["copy_gigabytes_per_second"] = found / GIGA
        return found

    def prepare(
        self, names: Sequence[str], build: Build, first_use: Callable[[MeasuredMethod], Any]
    ) -> dict[str, Prepared]:
        """Builds methods and measures the memory that each keeps.

        Args:
            names: The methods' names.
            build: Builds one method.
            first_use: Runs a method once, so that it allocates its caches.
        """
        prepared: dict[str, Prepared] = {}
        for name in names:
            self.progress(f"building {name}")
            before = live_bytes(self.device)
            method = build(name, self.backbone, self.settings)
            first_use(method)
            prepared[name] = Prepared(method, live_bytes(self.device) - before - method.own_weights)
        return prepared

    def measure(
        self,
        case: str,
        methods: Mapping[str, Prepared],
        *,
        run: Callable[[str], Any],
        timed: Callable[[str], Sample],
        warm_up: Callable[[str], Any] | None = None,
        describe: Callable[[Sample], str] = str,
        value: Callable[[Sample], float] | None = None,
    ) -> Measured[Sample]:
        """Warms up each method and measures its memory, then measures the methods in turn with `timed`.

        Args:
            case: The case's name, for progress messages.
            methods: The methods by name.
            run: Runs a method once, for the warm-up and the peak memory.
            timed: Measures one run of a method.
            warm_up: Runs a method without measurement. By default it calls `run` as often as the settings say.
            describe: Describes a sample for progress messages.
            value: The speed of a sample. Rounds in which the bare backbone is disturbed are measured again.
        """
        memory: dict[str, float] = {}
        for name, prepared in methods.items():
            self.progress(f"{case}: warming {name} up")
            if warm_up is None:
                for _ in range(self.settings.warmups):
                    run(name)
            else:
                warm_up(name)
            memory[name] = self.peak_memory(prepared, partial(run, name))
        return Measured(self.in_turn(case, list(methods), timed, describe, value), memory)

    def peak_memory(self, prepared: Prepared, run: Callable[[], Any]) -> float:
        """Peak memory in MiB: the backbone's, the method's own, and the peak growth during `run`."""
        return (self.backbone_bytes + prepared.kept + peak_growth(run, self.device)) / MIB


@contextmanager
def opened(settings: Settings, progress: Progress, cases: int, *, training: bool = False) -> Iterator[Session]:
    """A session with the backbone built.

    Args:
        settings: The settings. Machine-dependent defaults are filled in.
        progress: Called with progress messages.
        cases: Maximum number of compiled combinations of method and shape.
        training: Whether methods are trained.
    """
    session = Session(settings.resolved(training=training), progress)
    with only_new_objects(), room_for_graphs(cases):
        yield session
