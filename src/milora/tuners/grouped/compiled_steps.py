"""Which generation may have compiled decode steps: one at a time, and one whose every module the operator serves."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager

from milora.tuners.grouped.stacks import AdapterStacks
from milora_core.errors import MiLoraError

OF_THE_PROCESS = ("is_compiled", "_compiled_lock", "_compiling_thread")
"""Attributes that a copy or a pickle starts without."""


class CompiledSteps(ABC):
    """The part of [`milora.tuners.grouped.GroupedServing`] that compiled decode steps ask.

    Attributes:
        stacks: The model's.
        is_compiled: Whether any thread's decode steps are compiled. For traced code, in which no thread can be asked
            for; elsewhere see [`CompiledSteps.is_compiled_here`].
        eagerly: The argument of `generate` that rules a compiled step out.
    """

    stacks: AdapterStacks
    eagerly: str

    def begin_uncompiled(self) -> None:
        """Starts with no generation running."""
        self.is_compiled = False
        self._compiled_lock = threading.Lock()
        self._compiling_thread: int | None = None

    @abstractmethod
    def serving(self) -> AbstractContextManager[None]:
        """While in force the stacks are up to date and serve."""

    @abstractmethod
    def names_rows(self) -> bool:
        """Whether, in this thread, rows have adapters of their own."""

    def is_compiled_here(self) -> bool:
        """Whether it is this thread whose decode steps are compiled; others may generate eagerly meanwhile."""
        return self.is_compiled and threading.get_ident() == self._compiling_thread

    def why_not_compiled(self, adapters: Collection[str] | None = None) -> str | None:
        """What of the model keeps a generation from being compiled, if anything does.

        Args:
            adapters: Those of the generation; `None` for all that there are.
        """
        with self.serving():
            path = self._in_the_way()
            for each, module in self.stacks.modules.items():
                stacked, of_layer = set(module.slots), set(module.layer.lora_A)
                if path is None and (of_layer if adapters is None else of_layer & set(adapters)) - stacked:
                    path = each
        return None if path is None else _not_compilable(path)

    def _in_the_way(self) -> str | None:
        """The path of a module whose rows a compiled step could not tell apart."""
        wrappers = self.stacks.wrappers if self.names_rows() else {}
        return next(iter([*self.stacks.left_out, *wrappers]), None)

    def cannot_compile(self, path: str) -> MiLoraError:
        """What to raise where a module cannot be compiled."""
        return MiLoraError(f"{_not_compilable(path)}. Generate with {self.eagerly}.")

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """While in force a compiled decode step may run: one generation at a time, for its rows are at one address.

        Raises:
            MiLoraError: If another thread's compiled generation is running, or a layer cannot be compiled.
        """
        with self.alone(), self.compiled_steps():
            yield

    @contextmanager
    def compiled_if_possible(self, adapters: Collection[str]) -> Iterator[bool]:
        """As [`CompiledSteps.compiled`], of which nobody has asked for: what cannot be compiled is left alone.

        Args:
            adapters: Those of the generation.

        Yields:
            Whether the steps may be compiled.
        """
        is_alone = self._compiled_lock.acquire(blocking=False)
        try:
            if is_alone and self.why_not_compiled(adapters) is None:
                with self.compiled_steps():
                    yield True
                return
        finally:
            if is_alone:
                self._compiled_lock.release()
        yield False

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While in force no other thread generates with compiled steps.

        Raises:
            MiLoraError: If one does.
        """
        if not self._compiled_lock.acquire(blocking=False):
            raise MiLoraError(
                "Another compiled generation is running on this model, and its decode step reads one set of routes. "
                f"Generate one after the other, or with {self.eagerly}."
            )
        try:
            yield
        finally:
            self._compiled_lock.release()

    @contextmanager
    def compiled_steps(self) -> Iterator[None]:
        """As [`CompiledSteps.compiled`], for a thread that is [`CompiledSteps.alone`]."""
        with self.serving():
            path = self._in_the_way()
            if path is not None:
                raise self.cannot_compile(path)
            self._compiling_thread = threading.get_ident()
            self.is_compiled = True
            try:
                yield
            finally:
                self.is_compiled = False
                self._compiling_thread = None


def _not_compilable(path: str) -> str:
    return (
        f"{path} cannot be part of a compiled decode step: its base layer is quantised, its adapter is more than "
        "LoRA there (DoRA, a bias), batch and tokens are flattened before it, or each row has its adapter's own "
        "(modules_to_save, trainable tokens)"
    )
