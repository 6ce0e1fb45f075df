"""An engine that follows a script, for events that a real engine produces only when something is wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from milora.serving.events import Generation, TokenEvent, TokenLogprob
from milora.serving.requests import (
    AdapterInfo,
    AdapterInUseError,
    EngineStatistics,
    EngineStoppedError,
    GenerationRequest,
    UnknownAdapterError,
)
from support.tokenizer import CHARACTERS

Script = Callable[[GenerationRequest], Sequence[TokenEvent | Exception]]


def spelled(text: str, *, index: int = 0, finish: str | None = "stop", **of_first: object) -> list[TokenEvent]:
    """Events that spell a text, one character per token."""
    events = []
    for place, character in enumerate(text):
        token = CHARACTERS.index(character) + 1
        is_last = place == len(text) - 1
        events.append(
            TokenEvent(
                index,
                character,
                (token,),
                logprobs=(TokenLogprob(token, -0.5, ((token, -0.5), (1, float("-inf")))),),
                finish_reason=finish if is_last else None,
                **(of_first if place == 0 else {}),  # type: ignore[arg-type]
            )
        )
    return events


class FakeEngine:
    """A scripted engine. A final event `None` keeps the request open until it is cancelled.

    Attributes:
        script: Maps a request to its events.
        requests: The requests received.
        generations: The generations returned.
        known: The loaded adapters.
        refusal: Raised by `submit`.
        pages: The pages of the cache, of 16 tokens each.
    """

    def __init__(self, script: Script | None = None, adapters: Sequence[str] = ()) -> None:
        self.script: Script = script or (lambda request: spelled("done"))
        self.requests: list[GenerationRequest] = []
        self.generations: list[Generation] = []
        self.known: dict[str, Path] = {name: Path(f"/adapters/{name}") for name in adapters}
        self.refusal: Exception | None = None
        self.pages = 8
        self.unhealthy: str | None = None
        self.in_use: set[str] = set()
        self.cancelled = threading.Event()
        self.is_draining = False
        self.is_closed = False

    def submit(self, request: GenerationRequest) -> Generation:
        if self.refusal is not None:
            raise self.refusal
        if self.is_draining:
            raise EngineStoppedError("The engine is closing.")
        if request.adapter is not None and request.adapter not in self.known:
            raise UnknownAdapterError(f"There is no adapter {request.adapter!r}; did you mean {list(self.known)}?")
        self.requests.append(request)
        generation = Generation(self.cancelled.set)
        self.generations.append(generation)
        for event in self.script(request):
            if isinstance(event, Exception):
                generation.end(event)
                return generation
            if event is None:
                return generation
            generation.put(event)
        generation.end()
        return generation

    def load_adapter(self, name: str, folder: Path, *, replace: bool = False) -> None:
        if name in self.in_use:
            raise AdapterInUseError(f"Requests use the adapter {name!r}.")
        if name in self.known and not replace:
            raise AdapterInUseError(f"There is an adapter {name!r} already.")
        self.known[name] = folder

    def unload_adapter(self, name: str) -> None:
        if name not in self.known:
            raise UnknownAdapterError(f"There is no adapter {name!r}.")
        if name in self.in_use:
            raise AdapterInUseError(f"Requests use the adapter {name!r}.")
        del self.known[name]

    def adapters(self) -> tuple[AdapterInfo, ...]:
        return tuple(AdapterInfo(name, folder, "MILORA", True, 0) for name, folder in self.known.items())

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(
            waiting=3,
            running=2,
            cache_pages_used=5,
            cache_pages_cached=1,
            cache_pages_total=self.pages,
            page_tokens=16,
            prefix_hit_tokens=32,
            prompt_tokens={},
            generated_tokens={},
            steps=7,
            finished=4,
            failed=1,
            preempted=0,
            adapters_in_memory=len(self.known),
            adapters=len(self.known),
        )

    def healthy(self) -> str | None:
        return self.unhealthy

    def drain(self, timeout: float) -> bool:
        self.is_draining = True
        return True

    def close(self) -> None:
        self.is_closed = True
