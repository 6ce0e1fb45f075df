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
"""More than a decode step of one method needs, including recompilations in the warm-up."""


@contextmanager
def room_for_graphs(cases: int) -> Iterator[None]:
    """Lifts the limit on recompilations, which counts all methods' graphs of one function together.

    Without this the methods that come last would silently run uncompiled.
    """
    limits = {"recompile_limit": GRAPHS_OF_A_CASE * cases, "accumulated_recompile_limit": 16 * GRAPHS_OF_A_CASE * cases}
    config: Any = torch._dynamo.config
    with config.patch({name: max(value, getattr(config, name)) for name, value in limits.items()}):
        yield


def why_not_compiled(model: Any, beams: int) -> str | None:
    """Why a method's decode steps cannot be compiled like the others'; `None` if they can.

    Args:
        model: The bare backbone or a `PeftModel`.
        beams: Width of the search.
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
    """Counts the graphs that are compiled for each method, and the places where Dynamo broke one in two.

    Graphs are compiled while a method warms up, and none while it is measured. A step that is one graph has no break.
    """

    def __init__(self) -> None:
        self._graphs: dict[str, int] = {}
        self._breaks: dict[str, int] = {}

    def during(self, name: str, run: Callable[[], Returned]) -> Returned:
        """Runs something, and counts for `name` what is compiled meanwhile."""
        graphs, breaks = _graphs(), _breaks()
        result = run()
        self._graphs[name] = self.of(name) + _graphs() - graphs
        self._breaks[name] = self.breaks(name) + _breaks() - breaks
        return result

    def of(self, name: str) -> int:
        """How many graphs were compiled for `name`."""
        return self._graphs.get(name, 0)

    def breaks(self, name: str) -> int:
        """How often a graph broke while `name` was traced."""
        return self._breaks.get(name, 0)


def _graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def _breaks() -> int:
    return sum(counters["graph_break"].values())
