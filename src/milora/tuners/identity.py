"""Identities and uses of adapters: a name may be reused, reloaded, or deleted while in use."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from milora_core.errors import MiLoraError

BASE_ROW = "__base__"
"""PEFT's name for a row without an adapter."""

PATIENCE = 60.0
"""Seconds that deleting or replacing an adapter waits for the generations that use it."""


class Use:
    """A use of adapters by a forward pass or a generation.

    Attributes:
        adapters: Name -> identity when the use began.
        is_running: Whether a forward pass or generation needs the weights now. A cache keeps a use that has ended.
    """

    def __init__(self, adapters: dict[str, object]) -> None:
        self.adapters = adapters
        self.is_running = True


class AdapterIdentities:
    """The current adapters of a model. Each has a unique identity, so a later adapter of the same name differs."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held while adapters are added or removed, and while their parts are traversed."""
        self._identities: dict[str, object] = {}
        self._closing: set[str] = set()
        self._uses: WeakSet[Use] = WeakSet()

    # A copied or pickled model has its own adapters, without uses.
    def __getstate__(self) -> dict[str, Any]:
        return {"names": list(self._identities)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self._identities = {name: object() for name in state["names"]}

    def renew(self, name: str) -> None:
        """Gives a name a new identity, after its adapter was added or its weights were replaced."""
        with self.lock:
            self._identities[name] = object()

    def has(self, name: str) -> bool:
        """Whether an adapter of this name exists."""
        return name in self._identities

    def forget(self, name: str) -> None:
        """Removes the identity of a removed adapter."""
        with self.lock:
            self._identities.pop(name, None)

    def begin(self, names: Iterable[str]) -> Use:
        """Begins a use of adapters; [`AdapterIdentities.end`] ends it.

        Raises:
            MiLoraError: If an adapter does not exist, or is being loaded, replaced or deleted.
        """
        with self.lock:
            names = list(names)
            absent = (set(names) - set(self._identities)) | (self._closing & set(names))
            if absent:
                raise MiLoraError(
                    f"The adapter {min(absent)!r} is being loaded, replaced or deleted; try again afterwards."
                )
            use = Use({name: self._identities[name] for name in names})
            self._uses.add(use)
            return use

    def end(self, use: Use) -> None:
        """Ends a use: its computation no longer needs the adapters."""
        use.is_running = False
        self._uses.discard(use)

    def check(self, use: Use) -> None:
        """Checks that the adapters of a use still exist unchanged.

        Raises:
            MiLoraError: If an adapter was deleted or replaced.
        """
        for name, identity in use.adapters.items():
            if self._identities.get(name) is not identity:
                raise MiLoraError(
                    f"The adapter {name!r} was deleted or replaced since this cache was filled, so its tokens belong "
                    "to other weights. Start with the prompt and an empty cache."
                )

    def running(self) -> list[Use]:
        """The running uses of the model's adapters."""
        with self.lock:
            return [use for use in self._uses if use.is_running]

    def others_running(self, own: Iterable[Use] = ()) -> bool:
        """Whether uses other than `own` are running."""
        ids = {id(use) for use in own}
        return any(id(use) not in ids for use in self.running())

    @contextmanager
    def changing(self, name: str, own: Iterable[Use] = ()) -> Iterator[None]:
        """Inside this context no request uses the adapter of this name or starts to. Other changes wait.

        Args:
            name: The adapter.
            own: Uses of the caller's own context. Waiting for them would never end.

        Raises:
            MiLoraError: If the caller is generating with the adapter, or others still use it after [`PATIENCE`]
                seconds.
        """
        identity = self._identities.get(name)
        if any(use.is_running and use.adapters.get(name) is identity is not None for use in own):
            raise MiLoraError(
                f"The adapter {name!r} is in use by the generation that made this call; delete or replace it "
                "afterwards."
            )
        with self.lock:
            if name in self._closing:
                raise MiLoraError(f"The adapter {name!r} is already being deleted or replaced.")
            self._closing.add(name)
        try:
            self._wait(name, identity)
            with self.lock:
                yield
        finally:
            self._closing.discard(name)

    def _wait(self, name: str, identity: object | None) -> None:
        end = time.monotonic() + PATIENCE
        while identity is not None and self._is_used(name, identity):
            if time.monotonic() > end:
                raise MiLoraError(
                    f"The adapter {name!r} is still in use by running generations after {PATIENCE:.0f} s, so it was "
                    "not deleted or replaced. Try again when they have ended."
                )
            time.sleep(0.002)

    def _is_used(self, name: str, identity: object) -> bool:
        return any(use.adapters.get(name) is identity for use in self.running())
