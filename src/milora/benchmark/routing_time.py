"""The share of pooling and routing in a prefill."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from milora.benchmark.generating import TokenClock
from milora.tuners.milora.router import RouterLayer


class RoutingTime:
    """Sums the time of a model's routers, from a block's input to the chosen experts.

    Args:
        device: The model's device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._clocks: list[TokenClock] = []

    def timed(self, route: Any) -> Any:
        """The same function with timed calls."""

        def timed_route(*args: Any, **kwargs: Any) -> Any:
            clock = TokenClock(self._device)
            clock.tick()
            result = route(*args, **kwargs)
            clock.tick()
            self._clocks.append(clock)
            return result

        return timed_route

    def seconds(self) -> float:
        """Total seconds of all calls."""
        return sum(clock.seconds()[0] for clock in self._clocks)


@contextmanager
def routing_time(model: Any, device: torch.device) -> Iterator[RoutingTime | None]:
    """Times a model's routers inside the context. Yields `None` for a model without routers."""
    routers = [module for module in model.modules() if isinstance(module, RouterLayer)]
    if not routers:
        yield None
        return
    time = RoutingTime(device)
    for router in routers:
        router.__dict__["route_block"] = time.timed(router.route_block)
    try:
        yield time
    finally:
        for router in routers:
            del router.__dict__["route_block"]
