"""A model whose rows may have different adapters, computed together by one operator per module."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from milora.tuners.context import ContextOwner
from milora.tuners.grouped.stacks import ModuleStack, adapted_modules, stackable
from milora_core.errors import MiLoraError


class GroupedOwner(ContextOwner):
    """Owns a model's contexts, the stacks of its adapters, and its single compiled decode step.

    Attributes:
        model: The backbone with PEFT's layers.
        capacity: Number of adapters to reserve memory for, so another one is loaded without moving the others.
            Existing stacks keep their size.
        stacks: Path -> the stack of a LoRA layer, created on first use and again when adapters have changed.
        left_out: Path -> a LoRA layer without a stack, which uses its own forward: its base layer is quantised, or its
            adapters are more than `x A B` there (DoRA, a bias).
        wrappers: Path -> a module of which PEFT keeps a full or partial copy per adapter (`modules_to_save`,
            `trainable_token_indices`).
        compiled_for: The generation (or batch) with compiled decode steps. Others may run eagerly at the same time.
        eagerly: The argument of `generate` that disables compiled steps, for messages.
    """

    eagerly = "compiled=False"

    def __init__(self, model: nn.Module, capacity: int = 0) -> None:
        super().__init__()
        self.model = model
        self.capacity = capacity
        self._begin()

    def _begin(self) -> None:
        self.stacks: dict[str, ModuleStack] = {}
        self.left_out: dict[str, LoraLayer] = {}
        self.wrappers: dict[str, AuxiliaryTrainingWrapper] = {}
        self.compiled_for: Any = None
        self._compiled_lock = threading.Lock()
        self._compiling_thread: int | None = None

    # A copied or pickled model starts without stacks: its adapters have their own storage.
    def __getstate__(self) -> dict[str, Any]:
        own = {"stacks", "left_out", "wrappers", "compiled_for", "_compiled_lock", "_compiling_thread"}
        return {name: value for name, value in super().__getstate__().items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()

    def refresh(self) -> None:
        """Updates the stacks to the model's current adapters.

        This runs before every pass, so unchanged layers are only compared with their last state.
        """
        with self.identities.lock:
            running = self.identities.running()
            stacks: dict[str, ModuleStack] = {}
            left_out, wrappers = {}, {}
            for path, module in adapted_modules(self.model):
                if isinstance(module, AuxiliaryTrainingWrapper):
                    wrappers[path] = module
                    continue
                stack = self.stacks.get(path)
                if stack is None or stack.layer is not module or not stack.is_current():
                    adapters = stackable(module)
                    if not adapters:
                        left_out[path], module.stack = module, None
                        continue
                    if stack is None or stack.layer is not module:
                        stack = ModuleStack(path, module)
                    stack.fit(adapters, self.capacity, running)
                stacks[path] = module.stack = stack
            self.stacks, self.left_out, self.wrappers = stacks, left_out, wrappers

    def is_compiled_for(self, request: Any) -> bool:
        """Whether this request has the compiled decode steps. The thread's first request claims them."""
        if not self.is_compiled or threading.get_ident() != self._compiling_thread:
            return False
        if self.compiled_for is None:
            self.compiled_for = request
        return self.compiled_for is request

    def why_not_compiled(self, adapters: Collection[str] | None = None, *, named_rows: bool = False) -> str | None:
        """Why a generation with these adapters (`None` for all) cannot be compiled, or `None`; with `named_rows`, rows
        have different adapters."""
        self.refresh()
        path = next(iter([*self.left_out, *(self.wrappers if named_rows else [])]), None)
        for each, module in self.stacks.items():
            stacked, of_layer = set(module.slots), set(module.layer.lora_A)
            if path is None and (of_layer if adapters is None else of_layer & set(adapters)) - stacked:
                path = each
        return None if path is None else _not_compilable(path)

    def cannot_compile(self, path: str) -> MiLoraError:
        """The error for a module that cannot be compiled."""
        return MiLoraError(f"{_not_compilable(path)}. Generate with {self.eagerly}.")

    @contextmanager
    def compiled(
        self, adapters: Collection[str] = (), *, named_rows: bool = False, required: bool = True
    ) -> Iterator[bool]:
        """Inside this context a compiled decode step may run; see [`GroupedOwner.why_not_compiled`] for the arguments.

        Only one generation at a time can have compiled steps, because they read their rows from one address. If
        another thread's is running or a layer cannot be compiled, it yields `False`.

        Raises:
            MiLoraError: Instead of yielding `False`, if compiled steps are `required`.
        """
        with ExitStack() as stack:
            is_possible = True
            try:
                stack.enter_context(self.alone())
                reason = self.why_not_compiled(adapters, named_rows=named_rows)
                if reason is not None:
                    raise MiLoraError(f"{reason}. Generate with {self.eagerly}.")
                stack.enter_context(self.compiled_steps())
            except MiLoraError:
                if required:
                    raise
                stack.close()
                is_possible = False
            yield is_possible

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside this context no other thread may generate with compiled steps.

        Raises:
            MiLoraError: If another thread already does.
        """
        if not self._compiled_lock.acquire(blocking=False):
            raise MiLoraError(
                "Another compiled generation is running on this model, and a compiled decode step reads one set of "
                f"routes. Generate one after the other, or with {self.eagerly}."
            )
        try:
            yield
        finally:
            self._compiled_lock.release()

    @contextmanager
    def compiled_steps(self) -> Iterator[None]:
        """Like [`GroupedOwner.compiled`], for a thread that is [`GroupedOwner.alone`] and has checked
        `why_not_compiled`."""
        self._compiling_thread, self.compiled_for = threading.get_ident(), None
        self.is_compiled = True
        try:
            yield
        finally:
            self.is_compiled = False
            self._compiling_thread = self.compiled_for = None


def _not_compilable(path: str) -> str:
    return (
        f"{path} cannot be part of a compiled decode step: its base layer is quantised, its adapter is more than "
        "LoRA there (DoRA, a bias), batch and tokens are flattened before it, or each row has its adapter's own "
        "(modules_to_save, trainable tokens)"
    )
