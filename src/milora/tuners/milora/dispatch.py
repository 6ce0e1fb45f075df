"""What is in force: one place that a model's routers write to and its LoRA layers read from."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from milora.tuners.milora.decoding import PreparedExperts
from milora.tuners.milora.routing_pass import RoutingPass
from milora.tuners.milora.selection import Selection, selection_of
from milora.tuners.prompt_pass import PromptPass, PromptPasses
from milora_core.routing import Route


class _RoutingInForce(threading.local):
    def __init__(self) -> None:
        self.forced: Route | None = None
        self.merged: Route | None = None
        self.merge_into: ExitStack | None = None
        self.adapter_names: list[str] | None = None
        self.records: list[Route] | None = None


class Dispatcher(PromptPasses):
    """Holds what is in force, a thread: besides passes and generations, a given route, whether it is merged into the
    weights, the adapters of the rows, and where routes are recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self._routing_in_force = _RoutingInForce()

    def begin(self, prompt_pass: PromptPass) -> None:
        """As [`PromptPasses.begin`]; in a generation every forward but the first is a decode step."""
        in_generation = self._in_force.generation is not None
        follows = in_generation and self.following() is prompt_pass
        super().begin(prompt_pass)
        if not isinstance(prompt_pass, RoutingPass):
            return
        prompt_pass.is_merged = self.merged is not None
        if in_generation and prompt_pass.prepared is None and prompt_pass.adapter is not None:
            prompt_pass.prepared = PreparedExperts(prompt_pass.adapter, prompt_pass.routings)
        # Autocast casts weights on their way into every product, and gradients need the parameters themselves.
        prompt_pass.is_decode_step = follows and not torch.is_grad_enabled() and not _is_autocast_enabled()

    def current_selection(self, adapter: str, block: str, expert: int) -> Selection | None:
        """What an expert of the running pass does, `None` for nothing.

        Raises:
            RuntimeError: If no pass is running, or it has not reached the block.
        """
        running: RoutingPass | None = self.current
        if running is None:
            raise RuntimeError(f"A layer of {block} was called outside the model: there is no route. Call the model.")
        return selection_of(running.routings, adapter, block, expert)

    @property
    def forced(self) -> Route | None:
        """The route that [`Dispatcher.forcing`] put in force."""
        return self._routing_in_force.forced

    @property
    def adapter_names(self) -> list[str] | None:
        """The adapter of each row, where rows have their own."""
        return self._routing_in_force.adapter_names

    @contextmanager
    def forcing(self, route: Route | None) -> Iterator[None]:
        """In force: a given route, instead of what the routers would decide; `None` changes nothing."""
        outer = self.forced
        self._routing_in_force.forced = outer if route is None else route
        try:
            yield
        finally:
            self._routing_in_force.forced = outer

    @property
    def merged(self) -> Route | None:
        """The route that this thread has merged into the backbone's weights."""
        return self._routing_in_force.merged

    @property
    def merge_into(self) -> ExitStack | None:
        """Where the generation of this thread that asked for it is to merge its route, once that is known."""
        return self._routing_in_force.merge_into

    @contextmanager
    def merging(self, stack: ExitStack) -> Iterator[None]:
        """In force: the wish for a merged route, which ends with `stack`."""
        self._routing_in_force.merge_into = stack
        try:
            yield
        finally:
            self._routing_in_force.merge_into = None

    @contextmanager
    def following_merged(self, route: Route) -> Iterator[None]:
        """In force: a route whose experts are in the backbone's weights, so that no layer computes any."""
        if self.current is not None:
            self.current.is_merged = True
        self._routing_in_force.merged = route
        try:
            yield
        finally:
            self._routing_in_force.merged = None
            if self.current is not None:
                self.current.is_merged = False

    @property
    def records(self) -> list[Route] | None:
        """Where the routes of generations go while a caller records them."""
        return self._routing_in_force.records

    @contextmanager
    def recording(self) -> Iterator[list[Route]]:
        """In force: a list that gets the route of each generation at its end."""
        outer, self._routing_in_force.records = self.records, []
        try:
            yield self._routing_in_force.records
        finally:
            self._routing_in_force.records = outer

    @contextmanager
    def naming_rows(self, adapter_names: list[str]) -> Iterator[None]:
        """In force: an adapter for each row."""
        outer, self._routing_in_force.adapter_names = self.adapter_names, adapter_names
        try:
            yield
        finally:
            self._routing_in_force.adapter_names = outer


def _is_autocast_enabled() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
