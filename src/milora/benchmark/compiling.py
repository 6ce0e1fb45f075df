"""Compiled graphs of many methods in one process: raises the recompilation limit, and counts late graphs and graph
breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch._dynamo.utils import counters

from milora.tuners.grouped import GroupedOwner
from milora.tuners.iapt import IAPTModel
from milora.tuners.moelora import MoeLoraModel

Returned = TypeVar("Returned")

GRAPHS_OF_A_CASE = 16
"""An upper bound of the graphs of one method's decode step, including recompilations in the warm-up."""


@contextmanager
def room_for_graphs(cases: int) -> Iterator[None]:
    """Raises the recompilation limit. Dynamo counts the graphs of all methods for one function together.

    Otherwise the last methods would silently run uncompiled.
    """
    limits = {"recompile_limit": GRAPHS_OF_A_CASE * cases, "accumulated_recompile_limit": 16 * GRAPHS_OF_A_CASE * cases}
    config: Any = torch._dynamo.config
    with config.patch({name: max(value, getattr(config, name)) for name, value in limits.items()}):
        yield


def why_not_compiled(model: Any, beams: int) -> str | None:
    """The reason why a method's decode steps cannot be compiled; `None` if they can.

    Args:
        model: The bare backbone or a `PeftModel`.
        beams: Number of beams.
    """
    if beams > 1:
        return "transformers compiles no step of a beam search"
    tuner = getattr(model, "base_model", None)
    decides = getattr(tuner, "owner", None)
    decides = decides if isinstance(decides, GroupedOwner) else tuner
    if isinstance(decides, GroupedOwner | IAPTModel | MoeLoraModel):
        return decides.why_not_compiled()
    return None


class Compilations:
    """Counts the compiled graphs and the graph breaks of each method.

    Graphs should be compiled in the warm-up only. A step that is one graph has no break.
    """

    def __init__(self) -> None:
        self._graphs: dict[str, int] = {}
        self._breaks: dict[str, int] = {}

    def during(self, name: str, run: Callable[[], Returned]) -> Returned:
        """Calls `run` and counts the graphs compiled during the call for `name`."""
        graphs, breaks = _graphs(), _breaks()
        result = run()
        self._graphs[name] = self.of(name) + _graphs() - graphs
        self._breaks[name] = self.breaks(name) + _breaks() - breaks
        return result

    def of(self, name: str) -> int:
        """The number of graphs compiled for `name`."""
        return self._graphs.get(name, 0)

    def breaks(self, name: str) -> int:
        """The number of graph breaks of `name`."""
        return self._breaks.get(name, 0)


def _graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def _breaks() -> int:
    return sum(counters["graph_break"].values())
