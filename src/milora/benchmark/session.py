"""What every benchmark does before and after it measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from milora.benchmark.compiling import room_for_graphs
from milora.benchmark.environment import environment
from milora.benchmark.memory import live_bytes, only_new_objects, peak_growth
from milora.benchmark.methods import MeasuredMethod, build_backbone
from milora.benchmark.result import MIB, Result
from milora.benchmark.rounds import Progress, Turn
from milora.benchmark.settings import Settings
from milora.benchmark.sharing import model_bytes

Build = Callable[[str, Any, Settings], MeasuredMethod]
"""Makes a method from its name, the backbone and the settings."""


@dataclass(frozen=True)
class Prepared:
    """A method, and what it keeps in memory.

    Attributes:
        method: Ready to run.
        kept: Bytes that it keeps besides the backbone: its adapters, and what it made at its first use.
    """

    method: MeasuredMethod
    kept: int


class Session:
    """One backbone in memory and the methods around it.

    Args:
        settings: Resolved.
        progress: Is told how far it is.
    """

    def __init__(self, settings: Settings, progress: Progress) -> None:
        self.settings = settings
        self.progress = progress
        self.device = torch.device(settings.device or "cpu")
        self.rows: list[dict[str, Any]] = []
        self.order: list[Turn] = []
        self._before = environment(self.device)
        depth = "" if settings.layers is None else f", {settings.layers} blocks"
        progress(f"building {settings.backbone}{depth}, in {settings.dtype}")
        self.backbone = build_backbone(settings)
        self.backbone_bytes = model_bytes(self.backbone)

    def prepare(
        self, names: Sequence[str], build: Build, first_use: Callable[[MeasuredMethod], Any]
    ) -> dict[str, Prepared]:
        """Makes methods, and tells what each keeps.

        Args:
            names: Of the methods.
            build: Makes one.
            first_use: Runs a method once, so that it makes what it makes at its first use.
        """
        prepared: dict[str, Prepared] = {}
        for name in names:
            self.progress(f"building {name}")
            before = live_bytes(self.device)
            method = build(name, self.backbone, self.settings)
            first_use(method)
            prepared[name] = Prepared(method, live_bytes(self.device) - before - method.own_weights)
        return prepared

    def peak_memory(self, prepared: Prepared, run: Callable[[], Any]) -> float:
        """MiB: the backbone's, what the method keeps, and the most that `run` has on top of both."""
        return (self.backbone_bytes + prepared.kept + peak_growth(run, self.device)) / MIB

    def result(self, command: str) -> Result:
        """What has been measured."""
        after = environment(self.device)["load_average"]
        return Result(
            command,
            self.settings.to_dict(),
            self.rows,
            self.order,
            {**self._before, "load_average_after": after},
        )


@contextmanager
def opened(settings: Settings, progress: Progress, cases: int, *, training: bool = False) -> Iterator[Session]:
    """A session with the backbone built.

    Args:
        settings: What was asked for; defaults that depend on the machine are filled in.
        progress: Is told how far it is.
        cases: How many combinations of method and shape may be compiled.
        training: Whether methods are trained.
    """
    session = Session(settings.resolved(training=training), progress)
    with only_new_objects(), room_for_graphs(cases):
        yield session
