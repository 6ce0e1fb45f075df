"""The engine's adapters: known ones, ones in memory, and their routes."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from milora.backbone.adapter_tokenizer import adapter_tokenizer
from milora.serving.engine.adapter import Adapter
from milora.serving.engine.slots import AdapterSlots, shapes_of
from milora.serving.requests import AdapterError, AdapterInfo, AdapterInUseError, UnknownAdapterError
from milora.tuners.milora.packed import PackedRoute
from milora.tuners.milora.router import follow
from milora_core.errors import did_you_mean
from milora_core.routing import Route

MOST_ROUTES = 1024
"""Maximum number of routes kept for later requests with the same deciding tokens."""


class AdapterPool:
    """The adapters by name. A limited number is in memory; loading another evicts the least recently used.

    Args:
        backbone: The model. It gets PEFT's layers.
        tokenizer: The backbone's tokenizer.
        most: Maximum number of adapters in memory.

    Attributes:
        slots: The adapters in the model.
    """

    def __init__(self, backbone: Any, tokenizer: Any, most: int) -> None:
        self._tokenizer = tokenizer
        self._most = most
        self._numbers = itertools.count()
        self._known: dict[str, Adapter] = {}
        self._loaded: OrderedDict[Adapter, None] = OrderedDict()
        self.slots = AdapterSlots(backbone, most + 1)  # One more while an adapter is replaced.
        self._routes: OrderedDict[Hashable, PackedRoute] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    @property
    def in_memory(self) -> int:
        """Number of adapters in memory."""
        return len(self._loaded)

    def describe(self) -> tuple[AdapterInfo, ...]:
        """All adapters."""
        return tuple(
            AdapterInfo(adapter.name, adapter.folder, adapter.kind, adapter in self._loaded, adapter.uses)
            for adapter in self._known.values()
        )

    def find(self, name: str) -> Adapter:
        """Returns an adapter by its name.

        Raises:
            UnknownAdapterError: If there is no adapter with this name.
        """
        adapter = self._known.get(name)
        if adapter is None:
            hint = did_you_mean(name, self._known)
            raise UnknownAdapterError(f"There is no adapter {name!r}{hint or '.'}")
        return adapter

    def replaceable(self, name: str) -> Adapter | None:
        """The adapter with a name, which no request uses; `None` if there is no such adapter.

        Raises:
            AdapterInUseError: If a waiting or running request uses it.
        """
        adapter = self._known.get(name)
        if adapter is not None:
            self._check_unused(adapter)
        return adapter

    def open(self, name: str, folder: str | Path, *, replaces: bool = False) -> Adapter:
        """Creates an adapter without making it known. Reads only its configuration.

        Args:
            name: The adapter's name.
            folder: The adapter's folder.
            replaces: Whether the name may be taken.

        Raises:
            AdapterInUseError: If the name is taken.
            AdapterError: If the folder has no adapter of a method that the engine serves.
        """
        if name in self._known and not replaces:
            raise AdapterInUseError(f"There is an adapter {name!r} already; unload it first.")
        return Adapter(name, Path(folder), next(self._numbers))

    def publish(self, adapter: Adapter) -> None:
        """Makes an adapter known. Its weights are loaded when a request needs them."""
        self._known[adapter.name] = adapter

    def withdraw(self, name: str) -> Adapter:
        """Removes an adapter from the known ones and returns it.

        Raises:
            UnknownAdapterError: If there is no adapter with this name.
            AdapterInUseError: If a waiting or running request uses it.
        """
        self._check_unused(self.find(name))
        return self._known.pop(name)

    @staticmethod
    def _check_unused(adapter: Adapter) -> None:
        if adapter.uses:
            raise AdapterInUseError(
                f"{adapter.uses} requests use the adapter {adapter.name!r}; try again when they end."
            )

    def unload(self, adapter: Adapter) -> None:
        """Removes an adapter's weights from memory."""
        if adapter in self._loaded:
            del self._loaded[adapter]
            self.slots.clear(adapter)

    def is_loaded(self, adapter: Adapter) -> bool:
        """Whether the adapter's weights are in memory."""
        return adapter in self._loaded

    def can_load(self) -> bool:
        """Whether another adapter fits in memory, perhaps after evicting one that no running request uses."""
        return len(self._loaded) < self._most or any(not adapter.running for adapter in self._loaded)

    def load(self, adapter: Adapter) -> None:
        """Loads an adapter into memory. If memory is full, evicts the least recently used idle adapter.

        Raises:
            AdapterError: If its files cannot be read, do not fit the backbone, or have changed.
        """
        if adapter in self._loaded:
            self._loaded.move_to_end(adapter)
            return
        self._load(adapter, self._put)

    def load_beside(self, adapter: Adapter) -> None:
        """Loads an adapter without evicting another, even if memory is full. Call [`AdapterPool.evict_surplus`] later.

        Raises:
            AdapterError: If its files cannot be read or do not fit the backbone.
        """
        self._load(adapter, self.slots.make)

    def evict_surplus(self) -> None:
        """Evicts the least recently used idle adapters until no more than the maximum are in memory."""
        while len(self._loaded) > self._most:
            self.unload(next(each for each in self._loaded if not each.running))

    def _load(self, adapter: Adapter, put: Callable[[Adapter], None]) -> None:
        adapter.check_files()
        try:
            adapter.tokenizer = adapter.tokenizer or adapter_tokenizer(adapter.folder) or self._tokenizer
            put(adapter)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise AdapterError(f"The adapter {adapter.name!r} cannot be loaded: {reason}") from error
        self._loaded[adapter] = None

    def _put(self, adapter: Adapter) -> None:
        if len(self._loaded) < self._most:
            self.slots.make(adapter)
            return
        idle = [each for each in self._loaded if not each.running]
        # Prefers to replace an adapter of the same shapes, which takes a tenth of the time.
        shapes = shapes_of(adapter)
        replaced = next((each for each in idle if self.slots.shapes(each) == shapes), None)
        if replaced is not None:
            self.slots.take_over(adapter, replaced)
            del self._loaded[replaced]
        else:
            self.unload(idle[0])
            self.slots.make(adapter)

    def tokenizer_of(self, adapter: Adapter | None) -> Any:
        """The tokenizer that decodes an adapter's texts."""
        return self._tokenizer if adapter is None else adapter.tokenizer

    def new_route(self, adapter: Adapter, forced: Route | None, prompt: tuple[int, ...]) -> tuple[PackedRoute, bool]:
        """The route of a starting request, and whether the route is known.

        It is known for a LoRA adapter, if the request gives a route, or if the deciding tokens were routed before.

        Raises:
            MiLoraError: If the given route does not belong to this adapter.
        """
        route = PackedRoute(adapter.slot)
        routers = [r for r in self.slots.model.base_model.hooks.routers.values() if adapter.slot in r.experts]
        if adapter.kind == "LORA":
            for router in routers:
                route.fixed(router.block, len(router.experts[adapter.slot]))
            return route, True
        if forced is not None:
            for router in routers:
                experts = router.experts[adapter.slot]
                decision = follow(forced, router.block, experts, None, router.weight.device)
                route.decided(router.block, experts, decision)
            return route, True
        key = _route_key(adapter, prompt)
        stored = self._routes.get(key)
        if stored is None:
            return route, False
        self._routes.move_to_end(key)
        stored.adapter = adapter.slot  # A reloaded adapter may be in another slot.
        return stored, True

    def store_route(self, adapter: Adapter, prompt: tuple[int, ...], route: PackedRoute) -> None:
        """Keeps a route for later requests with the same deciding tokens. The prefix cache needs the route as a key."""
        if adapter.salt(None) is not None:
            return  # The key of this adapter's pages does not depend on the route.
        self._routes[_route_key(adapter, prompt)] = route
        if len(self._routes) > MOST_ROUTES:
            self._routes.popitem(last=False)


def _route_key(adapter: Adapter, prompt: tuple[int, ...]) -> Hashable:
    deciding = adapter.deciding(len(prompt))
    assert deciding is not None
    return adapter.number, prompt[: sum(deciding)]
