"""The context of a request: one context variable holds the caller's settings and the running forward pass.

A layer gets its model's running forward pass from [`running`]. Asyncio tasks, `asyncio.to_thread` and
`contextvars.copy_context().run` inherit the context. A plain thread inherits none. It is refused while another thread
has a context open, because that context may be meant for it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
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
_entries.set(())  # A thread that inherits no context has no value at all, unlike a context without entries.

_NOTHING_INHERITED = object()
_open_scopes: WeakKeyDictionary[ContextOwner, Counter[int]] = WeakKeyDictionary()
"""Number of open `with` statements of callers, by model and thread."""


class ContextOwner:
    """Identifies a model's contexts. A copied or pickled model starts with none.

    Attributes:
        identities: The identities of the model's adapters, and their uses.
        is_compiled: Whether a generation's decode steps are compiled. Traced code reads this because it cannot read
            the context variable.
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
    """The prompts of a batch and the values computed from them. Decode steps and the prompts' cache keep it.

    Attributes:
        rows: Number of rows of the batch.
        prompt: (rows, tokens), bool: the prompts' tokens; `None` if no layer reads them.
        use: The adapters of the rows.
        values: Values that layers keep for later passes, by the layers' keys.
    """

    rows: int
    prompt: Tensor | None
    use: Use
    values: dict[Any, Any] = field(default_factory=dict)

    def pick(self, rows: list[int]) -> Prompts:
        """Returns the prompts of a batch that consists of these rows of this one."""
        raise MiLoraError(
            "The rows of this cache were reordered, selected or repeated, but the values of its prompts cannot be. "
            "Start with the prompts and an empty cache."
        )

    # Copies of a cache share it, because later passes never change it. A pickled cache loses it with its model.
    def __deepcopy__(self, memo: dict[int, Any]) -> Prompts:
        return self

    def __reduce__(self) -> Any:
        return type(None), ()


class Generation:
    """A running `generate`.

    Attributes:
        attended: The caller's attention mask.
        inputs: Number of the caller's rows, before beams and return sequences.
        use: The adapters of the generation.
        prompts: The result of the prefill; `None` before it.
        tokens: (rows, tokens): the prefill's tokens, if the generation has no cache.
        columns: Tokens of the longest prompt, including padding.
        seen: Number of these tokens read so far.
        steps: The plan of its decode steps; `None` before the first.
        merge_into: Merges the route as soon as it is known.
        follows_all: Whether a separate pass has already read the prompt, so every pass follows its result.
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
        self.steps: Any = None
        self.merge_into = merge_into
        self.follows_all = False


@dataclass(frozen=True, eq=False)
class Scope:
    """A caller's settings for the calls inside a `with` statement, or the arguments of a running `generate`."""

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
    """A running forward pass.

    Attributes:
        owner: The owner of its model.
        prompts: Rows -> (adapter, route).
        mode: `route`: the routers decide; `follow`: the pass uses an earlier decision; `merged`: that decision is
            merged into the weights.
        plan: How adapted layers compute their rows.
        generation: The generation, if the pass is its prefill.
        use: The adapters of the pass, if it is outside a generation.
    """

    owner: ContextOwner
    prompts: Any
    mode: Literal["route", "follow", "merged"] = "route"
    plan: Any = None
    generation: Generation | None = None
    use: Use | None = None


def entries() -> tuple[Any, ...]:
    """The entries of this context, innermost last."""
    try:
        return _entries.get()
    except LookupError:
        is_main = threading.current_thread() is threading.main_thread()
        return () if is_main else (_NOTHING_INHERITED,)


def running(owner: ContextOwner) -> ForwardContext | None:
    """The model's running forward pass in this context, or `None`."""
    for entry in reversed(entries()):
        if entry.__class__ is ForwardContext and entry.owner is owner:
            return entry
    return None


def running_pass(owner: ContextOwner, part: str) -> ForwardContext:
    """The model's running forward pass, for a part of the model that needs it.

    Raises:
        RuntimeError: If no pass is running.
    """
    context = running(owner)
    if context is None:
        raise RuntimeError(
            f"{part} was called directly, but the prompt is known only when the whole model is called. Call the model "
            "that get_peft_model returned."
        )
    return context


def enter(entry: Scope | ForwardContext) -> None:
    """Adds an entry as the innermost."""
    _entries.set((*entries(), entry))


def leave(entry: Scope | ForwardContext) -> None:
    """Removes an entry at any position: generators and tasks may leave in another order than they entered."""
    found = entries()
    for place in reversed(range(len(found))):
        if found[place] is entry:
            _entries.set(found[:place] + found[place + 1 :])
            return


@contextmanager
def entered(entry: Scope | ForwardContext) -> Iterator[None]:
    """Inside this context `entry` is the innermost entry."""
    enter(entry)
    try:
        yield
    finally:
        if isinstance(entry, Scope):
            drop_interrupted(entry.owner, since=entry)
        leave(entry)


@contextmanager
def caller_scope(entry: Scope) -> Iterator[None]:
    """Like [`entered`], for a caller's `with` statement. Plain threads that start inside it are refused."""
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


@contextmanager
def generating(
    owner: ContextOwner,
    adapters: Iterable[str],
    attended: Tensor | None,
    size: tuple[int, int],
    *,
    route: Route | None = None,
    adapter_names: tuple[str, ...] | None = None,
) -> Iterator[Generation]:
    """Inside this context a `generate` with these adapters runs, whose prompts have `size` (rows, tokens).

    Raises:
        MiLoraError: If an adapter does not exist, or is being loaded, replaced or deleted.
    """
    use = owner.identities.begin(adapters)
    generation = Generation(attended, size, use)
    try:
        with entered(Scope(owner, route=route, adapter_names=adapter_names, generation=generation)):
            yield generation
    finally:
        owner.identities.end(use)


def scopes(owner: ContextOwner) -> Iterator[Scope]:
    """The scopes of a model in this context, innermost first."""
    for entry in reversed(entries()):
        if entry.__class__ is Scope and entry.owner is owner:
            yield entry


def generation_of(owner: ContextOwner) -> Generation | None:
    """The innermost generation of a model in this context."""
    return next((scope.generation for scope in scopes(owner) if scope.generation is not None), None)


def said(owner: ContextOwner, name: str) -> Any:
    """The caller's innermost setting for the next prompts, or `None`.

    The arguments of a running generation (its route, its rows' adapters) apply to its own prefill only. They do not
    apply to a call of the model from inside the generation, such as a scorer in a stopping criterion.
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
    """Removes forward passes of a model that an interrupt ended: a forward pass never runs inside another.

    Args:
        owner: The model's owner.
        since: Remove only passes that were entered after this scope.
    """
    found = entries()
    start = found.index(since) if since in found else 0
    for entry in found[start:]:
        if entry.__class__ is ForwardContext and entry.owner is owner:
            leave(entry)
            if entry.use is not None:
                owner.identities.end(entry.use)
