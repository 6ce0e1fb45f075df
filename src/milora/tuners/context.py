"""The current request of a layer: one context variable with the callers' settings and the running forward pass.

A layer gets the forward pass of its own model from [`running`]. The variable follows the request: asyncio tasks,
`asyncio.to_thread` and `contextvars.copy_context().run` inherit the surrounding context. A plain thread starts without
a context, so it is refused while another thread has one open, because it may have been started for that context.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch import Tensor

from milora.tuners.identity import AdapterIdentities, Use
from milora_core.errors import MiLoraError
from milora_core.routing import Route

_entries: ContextVar[tuple[Any, ...]] = ContextVar("milora")
_entries.set(())  # A thread that inherits no context has no value at all, which tells it from one with no entries.

_NOTHING_INHERITED = object()
_open_scopes: WeakKeyDictionary[ContextOwner, Counter[int]] = WeakKeyDictionary()
"""How many `with` statements of callers are open for a model, by thread."""


class ContextOwner:
    """The model that owns contexts; a copied or pickled model starts with none.

    Attributes:
        identities: The model's adapters beyond their names, and who uses them.
        is_compiled: Whether a generation's decode steps are compiled. Traced code reads it, which cannot ask for the
            request it works for.
    """

    def __init__(self) -> None:
        self.identities = AdapterIdentities()
        self.is_compiled = False

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "is_compiled"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, is_compiled=False)


@dataclass
class Prompts:
    """The prompts of a batch and their computed values, kept by decode steps and the prompts' cache.

    Attributes:
        rows: Number of rows of the batch.
        prompt: (rows, tokens), bool: the prompts' tokens; `None` where nothing is read off them.
        use: The adapters that serve the rows.
        values: What layers keep for later passes, by their own keys.
    """

    rows: int
    prompt: Tensor | None
    use: Use
    values: dict[Any, Any] = field(default_factory=dict)

    def pick(self, rows: list[int]) -> Prompts:
        """The same for a batch of other rows, each a row of this one."""
        raise MiLoraError(
            "The rows of this cache were reordered, selected or repeated, but the values of its prompts cannot be. "
            "Start with the prompts and an empty cache."
        )

    # A copied cache shares it: passes never change it afterwards. A pickled one has lost its model.
    def __deepcopy__(self, memo: dict[int, Any]) -> Prompts:
        return self

    def __reduce__(self) -> Any:
        return type(None), ()


class Generation:
    """A running `generate`.

    Attributes:
        attended: The attention mask that the caller gave.
        inputs: Rows that the caller gave, before beams and return sequences.
        use: The adapters that serve it.
        prompts: What the prefill worked out; `None` before it.
        tokens: (rows, tokens): what the prefill read, of a generation without a cache.
        columns: Tokens of the longest prompt, padding included.
        seen: How many of them were read.
        merge_into: Merges the route, once it is known.
        follows_all: Whether a pass of its own has read the prompt already, so that every pass follows that.
    """

    def __init__(
        self,
        attended: Tensor | None,
        inputs: tuple[int, int],
        use: Use,
        merge_into: Callable[[Route], None] | None = None,
    ) -> None:
        self.attended = attended
        self.inputs, self.columns = inputs
        self.use = use
        self.prompts: Prompts | None = None
        self.tokens: Tensor | None = None
        self.seen = 0
        self.merge_into = merge_into
        self.follows_all = False


@dataclass(frozen=True, eq=False)
class Scope:
    """What a caller said for the calls inside a `with` statement, or the arguments of a running `generate`."""

    owner: ContextOwner
    route: Route | None = None
    adapter_names: tuple[str, ...] | None = None
    prompt: Tensor | None = None
    tasks: Tensor | None = None
    routes: list[Route] | None = None
    generation: Generation | None = None
    merged: object | None = None
    batch: Any = None
    packed: Any = None


@dataclass(frozen=True, eq=False)
class ForwardContext:
    """The forward pass that runs.

    Attributes:
        owner: Its model.
        prompts: Rows -> (adapter, route).
        mode: Whether the routers decide, or the pass follows an earlier decision, or that is merged into the weights.
        plan: How adapted layers compute their rows.
        adapted: Adapter -> (rows, tokens), bool: the tokens that it changes; all tokens of an adapter that is missing.
        generation: The generation whose prefill this is.
        use: The adapters that the pass uses, outside a generation.
    """

    owner: ContextOwner
    prompts: Any
    mode: Literal["route", "follow", "merged"] = "route"
    plan: Any = None
    adapted: Mapping[str, Tensor] = field(default_factory=dict)
    generation: Generation | None = None
    use: Use | None = None


def entries() -> tuple[Any, ...]:
    """What was entered in this context, the innermost last."""
    try:
        return _entries.get()
    except LookupError:
        is_main = threading.current_thread() is threading.main_thread()
        return () if is_main else (_NOTHING_INHERITED,)


def running(owner: ContextOwner) -> ForwardContext | None:
    """The forward pass of a model that runs in this context."""
    for entry in reversed(entries()):
        if entry.__class__ is ForwardContext and entry.owner is owner:
            return entry
    return None


def enter(entry: Scope | ForwardContext) -> None:
    """Puts an entry innermost."""
    _entries.set((*entries(), entry))


def leave(entry: Scope | ForwardContext) -> None:
    """Takes an entry out, wherever it is: generators and tasks may leave in another order than they entered."""
    found = entries()
    for place in reversed(range(len(found))):
        if found[place] is entry:
            _entries.set(found[:place] + found[place + 1 :])
            return


@contextmanager
def entered(entry: Scope | ForwardContext) -> Iterator[None]:
    """Inside, `entry` is the innermost."""
    enter(entry)
    try:
        yield
    finally:
        if isinstance(entry, Scope):
            drop_interrupted(entry.owner, since=entry)
        leave(entry)


@contextmanager
def caller_scope(entry: Scope) -> Iterator[None]:
    """As [`entered`], for a `with` statement of a caller's; plain threads that start meanwhile are refused."""
    of_owner = _open_scopes.setdefault(entry.owner, Counter())
    thread = threading.get_ident()
    of_owner[thread] += 1
    try:
        with entered(entry):
            yield
    finally:
        of_owner[thread] -= 1
        if not of_owner[thread]:
            del of_owner[thread]


def scopes(owner: ContextOwner) -> Iterator[Scope]:
    """The scopes of a model in this context, the innermost first."""
    for entry in reversed(entries()):
        if entry.__class__ is Scope and entry.owner is owner:
            yield entry


def generation_of(owner: ContextOwner) -> Generation | None:
    """The innermost generation of a model in this context."""
    return next((scope.generation for scope in scopes(owner) if scope.generation is not None), None)


def said(owner: ContextOwner, name: str) -> Any:
    """What the caller said about the next prompts, the innermost first; `None` if nothing.

    A running generation's own arguments (its route, its rows' adapters) are for its own prefill. They do not concern a
    call of the model from inside it, such as a scorer's in a stopping criterion.
    """
    is_inside = False
    for scope in scopes(owner):
        generation = scope.generation
        is_inside = is_inside or (generation is not None and generation.prompts is not None)
        if is_inside and (generation is not None or name == "adapter_names"):
            continue
        if getattr(scope, name) is not None:
            return getattr(scope, name)
    return None


def check_thread(owner: ContextOwner) -> None:
    """Refuses a thread that inherited no context while other threads have one open for the model.

    Raises:
        MiLoraError: If it is ambiguous whether the open contexts are meant for this thread.
    """
    if entries()[:1] != (_NOTHING_INHERITED,) or any(True for _ in scopes(owner)):
        return
    if any(thread != threading.get_ident() for thread in _open_scopes.get(owner, ())):
        raise MiLoraError(
            "Another thread has a context open on this model (use_route, use_prompt, record_routes, ...), and this "
            "thread did not inherit it, so its route is ambiguous. Pass route= to generate, run it with "
            "contextvars.copy_context().run or asyncio.to_thread, or enter use_route here (use_route(None) lets the "
            "routers decide)."
        )


def drop_interrupted(owner: ContextOwner, since: Scope | None = None) -> None:
    """Takes out forward passes of a model that an interrupt ended: a forward pass never runs inside another.

    Args:
        owner: The model's.
        since: Only those that were entered after this.
    """
    found = entries()
    start = found.index(since) if since in found else 0
    for entry in found[start:]:
        if entry.__class__ is ForwardContext and entry.owner is owner:
            leave(entry)
            if entry.use is not None:
                owner.identities.end(entry.use)
