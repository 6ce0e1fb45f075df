"""Which threads are computing with the backbone's weights, while one of them may want to change these."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from milora_core.errors import MiLoraError


class SharedWeights:
    """Which threads are computing with the backbone's weights, and which one has changed them.

    A thread with a merged route has the backbone for itself: others are refused and not made to wait, for how long its
    caller holds on to the route is not known.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._generations: Counter[int] = Counter()
        self._forwards: set[int] = set()
        self._owner: int | None = None

    # A copied or pickled model is used by nobody.
    def __getstate__(self) -> dict[str, Any]:
        return {"in_use": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).__init__(self)

    def begin_forward(self) -> None:
        """A forward pass of this thread begins.

        Raises:
            MiLoraError: If another thread has merged a route.
        """
        with self._lock:
            self._refuse_under_another()
            self._forwards.add(threading.get_ident())

    def end_forward(self) -> None:
        """It has ended."""
        with self._lock:
            self._forwards.discard(threading.get_ident())

    @contextmanager
    def generating(self) -> Iterator[None]:
        """While in force, this thread generates, and none may merge a route but this one.

        Raises:
            MiLoraError: If another thread has merged a route.
        """
        thread = threading.get_ident()
        with self._lock:
            self._refuse_under_another()
            self._generations[thread] += 1
        try:
            yield
        finally:
            with self._lock:
                self._generations[thread] -= 1
                self._generations += Counter()  # drops what has come to zero
                if thread not in self._generations:
                    # A forward that a KeyboardInterrupt ended has not said so.
                    self._forwards.discard(thread)

    @contextmanager
    def owned(self) -> Iterator[None]:
        """While in force, this thread alone may use the weights, and may change them.

        Raises:
            MiLoraError: If another thread is using them, or this one has merged a route already.
        """
        thread = threading.get_ident()
        with self._lock:
            self._refuse_under_another()
            if self._owner is not None:
                raise MiLoraError("A route is merged into the backbone already; leave it before another is merged.")
            alive = {each.ident for each in threading.enumerate()}
            if ({*self._generations, *self._forwards} & alive) - {thread}:
                raise MiLoraError(
                    "Another thread is generating with this backbone, and merging a route would change the weights "
                    "under it. Merge when it has ended, or generate without merge_route."
                )
            self._owner = thread
        try:
            yield
        finally:
            with self._lock:
                self._owner = None

    def _refuse_under_another(self) -> None:
        if self._owner not in (None, threading.get_ident()):
            raise MiLoraError(
                "Another thread has merged a route into the backbone's weights, so this one cannot use them until "
                "that thread has ended. Generate one after the other, or there without merge_route."
            )
