"""The adapters of the engine: which are known, which are in memory, and what follows from how they were trained."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from milora.backbone.adapter_tokenizer import adapter_tokenizer
from milora.backbone.loading import read_adapter_config
from milora.inference.plain_lora import add_lora
from milora.serving.requests import AdapterError, AdapterInfo, AdapterInUseError, UnknownAdapterError
from milora.tuners.grouped import GroupedOwner
from milora.tuners.milora import MiLoraConfig
from milora.tuners.milora.packed import PackedRoute
from milora.tuners.milora.packed_rows import PackedModules
from milora.tuners.milora.routed import BlockRouting
from milora.tuners.milora.router import follow
from milora_core.errors import MiLoraError, did_you_mean
from milora_core.kernels.native import library
from milora_core.routing import Route

KINDS = ("MILORA", "LORA")
MOST_ROUTES = 1024
"""Decided routes that are kept for later requests with the same deciding tokens."""


class Adapter:
    """An adapter that the engine knows, in memory or not.

    Args:
        name: Its name.
        folder: Its folder.
        number: Tells it from any other adapter of its name, before or after it.

    Attributes:
        kind: PEFT's name of its method.
        inner_name: Its name in the model, where names may hold no dots.
        uses: How many waiting or running requests use it.
        running: How many of these are running, so that it must stay in memory.
        is_late: Whether prompts but for their last token are the bare backbone's (`adapted_tokens="completion"`).
        is_shared: Whether what it leaves to the bare backbone is the same for all adapters.
    """

    def __init__(self, name: str, folder: Path, number: int) -> None:
        try:
            config = read_adapter_config(folder)
        except MiLoraError as error:
            raise AdapterError(str(error)) from error
        self.kind = str(getattr(config.peft_type, "value", config.peft_type))
        if self.kind not in KINDS:
            raise AdapterError(f"{folder} holds a {self.kind} adapter; the engine serves {' and '.join(KINDS)}.")
        self.name, self.folder, self.number = name, folder, number
        self.inner_name = f"adapter{number}"
        self.uses = self.running = 0
        self.tokenizer: Any = None
        self.files = self._state_of_files()
        is_routed = self.kind == "MILORA"
        self.is_late = is_routed and config.adapted_tokens == "completion"
        self.is_shared = self.is_late and not config.modules_to_save and not config.trainable_token_indices
        self._window: int | None = config.router_window if is_routed else None
        self._reads_last = is_routed and config.pooler == "last" and self._window is None

    def deciding(self, prompt: int) -> tuple[int, int] | None:
        """The first prompt token that the routers read, and how many; `None` for a LoRA adapter.

        Args:
            prompt: Tokens of the prompt.
        """
        if self.kind == "LORA":
            return None
        if self._reads_last and self.is_late:
            return prompt - 1, 1
        return 0, prompt if self._window is None else min(prompt, self._window)

    def salt(self, route: PackedRoute | None) -> Hashable | None:
        """What computes its cached tokens; `None` while the route is not known.

        Args:
            route: The request's route, if it is known.
        """
        if self.is_shared and (route is not None or self._reads_last):
            return ()
        if route is None:
            return None
        gates = tuple((block, tuple(of_block)) for block, of_block in route.gates.items())
        return (self.number, gates)

    def check_files(self) -> None:
        """Refuses a folder whose files were changed since it was loaded: texts and caches are of the old ones.

        Raises:
            AdapterError: If they were.
        """
        if self._state_of_files() != self.files:
            raise AdapterError(
                f"The files of adapter {self.name!r} in {self.folder} have changed since it was loaded; unload it and "
                "load it again."
            )

    def _state_of_files(self) -> list[tuple[int, int]]:
        try:
            found = [(self.folder / name).stat() for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)]
        except OSError as error:
            raise AdapterError(f"{self.folder} holds no adapter: {error}.") from error
        return [(state.st_mtime_ns, state.st_size) for state in found]


class AdapterPool:
    """The adapters by name, of which so many are in memory; the least recently used go when others come.

    Args:
        backbone: The model, which gets PEFT's layers.
        tokenizer: The backbone's.
        most: How many adapters are in memory at most.

    Attributes:
        model: The backbone with PEFT's layers.
        packed: The adapters for the native kernel; `None` where there is none.
    """

    def __init__(self, backbone: Any, tokenizer: Any, most: int) -> None:
        self._tokenizer = tokenizer
        self._most = most
        self._numbers = itertools.count()
        self._known: dict[str, Adapter] = {}
        self._loaded: OrderedDict[Adapter, None] = OrderedDict()
        self.model: PeftModel = get_peft_model(backbone, MiLoraConfig(r=1, top_k=1), adapter_name="empty").eval()
        self.model.delete_adapter("empty")
        is_native = backbone.device.type == "cpu" and library() is not None
        self.packed = PackedModules(backbone, most) if is_native else None
        self._routes: OrderedDict[Hashable, PackedRoute] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    @property
    def owner(self) -> GroupedOwner:
        """The owner of the model's contexts."""
        owner: GroupedOwner = self.model.base_model.owner
        return owner

    @property
    def in_memory(self) -> int:
        """How many adapters are in memory."""
        return len(self._loaded)

    def close(self) -> None:
        """Takes all adapters and PEFT's layers out of the backbone."""
        self.model.unload()

    def describe(self) -> tuple[AdapterInfo, ...]:
        """All adapters."""
        return tuple(
            AdapterInfo(adapter.name, adapter.folder, adapter.kind, adapter in self._loaded, adapter.uses)
            for adapter in self._known.values()
        )

    def find(self, name: str) -> Adapter:
        """An adapter by its name.

        Raises:
            UnknownAdapterError: If there is none.
        """
        adapter = self._known.get(name)
        if adapter is None:
            hint = did_you_mean(name, self._known)
            raise UnknownAdapterError(f"There is no adapter {name!r}{hint or '.'}")
        return adapter

    def open(self, name: str, folder: str | Path) -> Adapter:
        """An adapter that is not known yet; nothing but its configuration is read.

        Raises:
            AdapterInUseError: If the name is taken.
            AdapterError: If the folder holds no adapter of a method that the engine serves.
        """
        if name in self._known:
            raise AdapterInUseError(f"There is an adapter {name!r} already; unload it first.")
        return Adapter(name, Path(folder), next(self._numbers))

    def publish(self, adapter: Adapter) -> None:
        """Makes an adapter known; its weights are read when a request needs them."""
        self._known[adapter.name] = adapter

    def withdraw(self, name: str) -> Adapter:
        """Makes an adapter unknown.

        Raises:
            UnknownAdapterError: If there is none of this name.
            AdapterInUseError: If a waiting or running request uses it.
        """
        adapter = self.find(name)
        if adapter.uses:
            raise AdapterInUseError(f"{adapter.uses} requests use the adapter {name!r}; try again when they end.")
        return self._known.pop(name)

    def unload(self, adapter: Adapter) -> None:
        """Takes an adapter's weights out of memory."""
        if adapter in self._loaded:
            del self._loaded[adapter]
            if self.packed is not None:
                self.packed.remove(adapter.inner_name)
            self._discard(adapter)

    def is_loaded(self, adapter: Adapter) -> bool:
        """Whether its weights are in memory."""
        return adapter in self._loaded

    def can_load(self) -> bool:
        """Whether there is room for one more, or one that no running request uses."""
        return len(self._loaded) < self._most or any(not adapter.running for adapter in self._loaded)

    def load(self, adapter: Adapter) -> None:
        """Brings an adapter into memory, in place of the least recently used one that nobody runs with.

        Raises:
            AdapterError: If its files cannot be read, do not fit the backbone, or have changed.
        """
        if adapter in self._loaded:
            self._loaded.move_to_end(adapter)
            return
        adapter.check_files()
        while len(self._loaded) >= self._most:
            self.unload(next(idle for idle in self._loaded if not idle.running))
        try:
            if adapter.kind == "LORA":
                add_lora(self.model, adapter.inner_name, adapter.folder)
            else:
                self.model.load_adapter(str(adapter.folder), adapter_name=adapter.inner_name)
            adapter.tokenizer = adapter.tokenizer or adapter_tokenizer(adapter.folder) or self._tokenizer
        except (MiLoraError, ValueError, RuntimeError, KeyError, OSError) as error:
            self._discard(adapter)
            reason = str(error).splitlines()[0]
            raise AdapterError(f"The adapter {adapter.name!r} cannot be loaded: {reason}") from error
        self.model.eval()
        self._loaded[adapter] = None
        if self.packed is not None:
            self.packed.add(adapter.inner_name)

    def tokenizer_of(self, adapter: Adapter | None) -> Any:
        """The tokenizer that an adapter's texts are decoded with."""
        return self._tokenizer if adapter is None else adapter.tokenizer

    def new_route(self, adapter: Adapter, forced: Route | None, prompt: tuple[int, ...]) -> tuple[PackedRoute, bool]:
        """The route of a request that begins, and whether it is known.

        It is for a LoRA adapter, one that the request gives, or one that was decided before from the same tokens.

        Raises:
            MiLoraError: If the given route is not of this adapter.
        """
        route = PackedRoute(adapter.inner_name)
        routers = [r for r in self.model.base_model.hooks.routers.values() if adapter.inner_name in r.experts]
        if adapter.kind == "LORA":
            for router in routers:
                route.gates[router.block] = [1.0] * len(router.experts[adapter.inner_name])
            return route, True
        if forced is not None:
            for router in routers:
                experts = router.experts[adapter.inner_name]
                decision = follow(forced, router.block, experts, None, router.weight.device)
                route.decided(router.block, BlockRouting(experts, decision, []))
            return route, True
        key = _route_key(adapter, prompt)
        stored = self._routes.get(key)
        if stored is None:
            return route, False
        self._routes.move_to_end(key)
        return stored, True

    def store_route(self, adapter: Adapter, prompt: tuple[int, ...], route: PackedRoute) -> None:
        """Keeps a decided route for later requests with the same deciding tokens, whose cached pages it finds."""
        if adapter.salt(None) is not None:
            return  # Such pages are found without it.
        self._routes[_route_key(adapter, prompt)] = route
        if len(self._routes) > MOST_ROUTES:
            self._routes.popitem(last=False)

    def _discard(self, adapter: Adapter) -> None:
        if adapter.inner_name in self.model.peft_config:
            self.model.delete_adapter(adapter.inner_name)


def _route_key(adapter: Adapter, prompt: tuple[int, ...]) -> Hashable:
    deciding = adapter.deciding(len(prompt))
    assert deciding is not None
    return adapter.number, prompt[: sum(deciding)]
