"""Compiled graphs of many methods in one process: room for them, and a count of those that come late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch._dynamo.utils import counters

Returned = TypeVar("Returned")

GRAPHS_OF_A_CASE = 16
"""More than a decode step of one method needs, whatever it recompiles while it warms up."""


@contextmanager
def room_for_graphs(cases: int) -> Iterator[None]:
    """Lifts the limit on recompilations, which counts all methods' graphs of one function together.

    Without this the methods that come last would silently run uncompiled.
    """
    limits = {"recompile_limit": GRAPHS_OF_A_CASE * cases, "accumulated_recompile_limit": 16 * GRAPHS_OF_A_CASE * cases}
    config: Any = torch._dynamo.config
    with config.patch({name: max(value, getattr(config, name)) for name, value in limits.items()}):
        yield


class Compilations:
    """Counts the graphs that are compiled for each method: some while it warms up, none while it is measured."""

    def __init__(self) -> None:
        self._found: dict[str, int] = {}

    def during(self, name: str, run: Callable[[], Returned]) -> Returned:
        """Runs something, and counts for `name` what is compiled meanwhile."""
        before = counters["stats"]["unique_graphs"]
        result = run()
        self._found[name] = self._found.get(name, 0) + counters["stats"]["unique_graphs"] - before
        return result

    def of(self, name: str) -> int:
        """How many graphs were compiled for `name`."""
        return self._found.get(name, 0)
