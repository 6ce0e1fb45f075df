"""The engine: one thread that owns the model, with a thread-safe interface."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from milora.serving.engine.adapters import AdapterPool
from milora.serving.engine.checks import check_request, check_route
from milora.serving.engine.runner import Runner
from milora.serving.engine.scheduler import Part, Scheduler
from milora.serving.engine.sequence import Job
from milora.serving.engine.settings import EngineSettings
from milora.serving.engine.writer import Writer, failed
from milora.serving.events import Generation
from milora.serving.requests import (
    AdapterInfo,
    AdapterInUseError,
    DeadlineError,
    EngineStatistics,
    EngineStoppedError,
    GenerationRequest,
    QueueFullError,
    ServingError,
)

_log = logging.getLogger(__name__)

IDLE_SECONDS = 0.2
"""Interval at which an idle engine checks for expired deadlines."""


class Engine:
    """Continuous batching of many tenants' requests on one backbone. You may call its methods from any thread.

    Requests join and leave the batch between steps. A step computes single tokens of running texts and chunks of
    prompts together, each with its own adapter and route: MiLoRA, MiDoRA, LoRA and DoRA adapters and the bare backbone
    in one batch. It supports decoder-only models that call transformers' attention interface with full or
    sliding-window attention (Llama, Qwen, Mistral, Gemma and others), and rejects others by name. On a CPU, steps use
    the native kernels. On a GPU, adapters use a Triton kernel, which has been tested in Triton's interpreter only.

    Args:
        backbone: A Hugging Face causal language model without adapters, in eval mode. Do not use it elsewhere until
            [`Engine.close`].
        tokenizer: The backbone's tokenizer.
        adapters: Adapter folders by name; none by default. Weights are loaded when a request needs them.
        settings: Sizes and limits.

    Raises:
        MiLoraError: If the backbone cannot be served, or a folder has no adapter that can be served.
    """

    def __init__(
        self,
        backbone: Any,
        tokenizer: Any,
        adapters: Mapping[str, str | Path] | None = None,
        settings: EngineSettings | None = None,
    ) -> None:
        self.settings = settings = settings or EngineSettings()
        self._runner = Runner(
            backbone, settings.cache_bytes, settings.page_tokens, packs_weights=settings.packs_weights
        )
        self._cache = self._runner.cache
        self._pool = AdapterPool(backbone, tokenizer, settings.adapters_in_memory)
        for name, folder in (adapters or {}).items():
            self._pool.publish(self._pool.open(name, folder))
        self._scheduler = Scheduler(
            self._cache.pool,
            self._pool,
            settings.most_texts,
            settings.step_tokens,
            shares_prefixes=settings.prefix_cache,
        )
        self._writer = Writer(self._scheduler, self._cache, _ends(backbone), self._pool.tokenizer_of, self._end)
        self._changed = threading.Condition()
        self._arrived: deque[Job] = deque()
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._numbers = itertools.count()
        self._unfinished: set[Job] = set()
        self._waiting = 0
        self._counts = {"finished": 0, "failed": 0}
        self._prompt_tokens: dict[str, int] = defaultdict(int)
        self._is_draining = self._is_closing = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._work, name="milora-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ any thread

    def submit(self, request: GenerationRequest) -> Generation:
        """Queues a request.

        Raises:
            InvalidRequestError: If a value is out of range for this backbone, or a route is given without routers.
            PromptTooLongError: If prompt and new tokens do not fit the backbone's positions or the cache.
            UnknownAdapterError: If there is no such adapter.
            QueueFullError: If the queue is full.
            EngineStoppedError: If the engine is draining, closed, or has failed.
        """
        check_request(request, self.settings, self._runner)
        with self._changed:
            self._check_accepts()
            adapter = None if request.adapter is None else self._pool.find(request.adapter)
            check_route(request, adapter)
            if self._waiting >= self.settings.most_waiting:
                raise QueueFullError(f"{self._waiting} requests wait already; try again later.")
            generation = Generation(self._wake)
            job = Job(request, generation, adapter, next(self._numbers))
            if adapter is not None:
                adapter.uses += 1
            self._waiting += 1
            self._prompt_tokens[request.tenant] += len(request.prompt)
            self._unfinished.add(job)
            self._arrived.append(job)
            self._changed.notify_all()
        return generation

    def load_adapter(self, name: str, folder: str | Path, *, replace: bool = False) -> None:
        """Loads an adapter between two steps and returns when it is loaded.

        Args:
            name: The adapter's name.
            folder: The adapter's folder.
            replace: Whether to replace an adapter with this name. If the new one cannot be loaded, the old one stays.

        Raises:
            AdapterError: If the folder has no adapter that can be served on this backbone.
            AdapterInUseError: If the name is taken, or a waiting or running request uses the adapter to replace.
            EngineStoppedError: If the engine is closed or has failed.
        """

        def load() -> None:
            with self._changed:
                replaced = self._pool.replaceable(name) if replace else None
            adapter = self._pool.open(name, folder, replaces=replaced is not None)
            if replaced is None:
                self._pool.load(adapter)
                with self._changed:
                    self._pool.publish(adapter)
                return
            self._pool.load_beside(adapter)
            try:
                with self._changed:
                    self._pool.withdraw(name)  # Fails if a request for the old adapter has arrived meanwhile.
                    self._pool.publish(adapter)
            except AdapterInUseError:
                self._pool.unload(adapter)
                raise
            self._pool.unload(replaced)
            self._pool.evict_surplus()

        self._between_steps(load)

    def unload_adapter(self, name: str) -> None:
        """Removes an adapter.

        Raises:
            UnknownAdapterError: If there is no adapter with this name.
            AdapterInUseError: If a waiting or running request uses it.
            EngineStoppedError: If the engine is closed or has failed.
        """

        def unload() -> None:
            with self._changed:
                adapter = self._pool.withdraw(name)
            self._pool.unload(adapter)

        self._between_steps(unload)

    def adapters(self) -> tuple[AdapterInfo, ...]:
        """All adapters, in the order in which they were added."""
        with self._changed:
            return self._pool.describe()

    def statistics(self) -> EngineStatistics:
        """A snapshot of the engine's counters and sizes."""
        pages = self._cache.pool
        with self._changed:
            return EngineStatistics(
                waiting=self._waiting,
                running=sum(len(job.texts) for job in list(self._scheduler.running)),
                cache_pages_used=pages.pages - pages.available,
                cache_pages_cached=pages.idle,
                cache_pages_total=pages.pages,
                page_tokens=pages.page_tokens,
                prefix_hit_tokens=self._scheduler.prefix_hit_tokens,
                prompt_tokens=dict(self._prompt_tokens),
                generated_tokens=dict(self._writer.generated),
                steps=self._runner.steps,
                finished=self._counts["finished"],
                failed=self._counts["failed"],
                preempted=self._scheduler.preempted,
                adapters_in_memory=self._pool.in_memory,
                adapters=len(self._pool),
            )

    def healthy(self) -> str | None:
        """`None` while the engine works, else a description of the problem."""
        if self._failure is not None:
            return self._failure
        return None if self._thread.is_alive() else "The engine is closed."

    def drain(self, timeout: float | None = None) -> bool:
        """Rejects new requests and waits until all others have ended.

        Args:
            timeout: Maximum seconds to wait; `None` for no limit.

        Returns:
            Whether all requests have ended.
        """
        with self._changed:
            self._is_draining = True
            # A condition does not accept longer times, such as infinity.
            longest = None if timeout is None else min(timeout, threading.TIMEOUT_MAX)
            return self._changed.wait_for(lambda: not self._unfinished, longest)

    def close(self) -> None:
        """Stops the engine. Unfinished requests end with [`EngineStoppedError`]. The backbone is then free again."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_accepts(self) -> None:
        if self._failure is not None:
            raise EngineStoppedError(f"The engine has stopped: {self._failure}")
        if self._is_closing or self._is_draining:
            raise EngineStoppedError("The engine is closing and takes no more requests.")

    def _between_steps(self, command: Callable[[], None]) -> None:
        done: Future[None] = Future()
        with self._changed:
            if self._failure is not None or self._is_closing:
                raise EngineStoppedError(f"The engine has stopped: {self._failure or 'it was closed.'}")
            self._commands.append((command, done))
            self._changed.notify_all()
        done.result()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # ------------------------------------------------------- the engine's thread

    def _work(self) -> None:
        try:
            while self._wait():
                self._run_commands()
                self._take_arrived()
                self._drop_ended()
                self._step()
        except BaseException as error:
            _log.exception("The engine has stopped.")
            self._failure = f"{type(error).__name__}: {error}"
        finally:
            self._stop()

    def _wait(self) -> bool:
        """Waits for work. Returns whether the engine continues."""
        with self._changed:
            if not (self._unfinished or self._commands or self._is_closing):
                self._changed.wait(IDLE_SECONDS)
            return not self._is_closing

    def _run_commands(self) -> None:
        while self._commands:
            command, done = self._commands.popleft()
            try:
                done.set_result(command())
            except Exception as error:  # The error goes to the caller. Running requests are not affected.
                done.set_exception(error)

    def _take_arrived(self) -> None:
        while self._arrived:
            self._scheduler.add(self._arrived.popleft())

    def _drop_ended(self) -> None:
        """Ends cancelled requests and waiting requests past their deadline."""
        now = time.monotonic()
        for job in [*self._scheduler.waiting(), *self._scheduler.running]:
            if job.generation.is_cancelled:
                self._end(job, None)
        for job in list(self._scheduler.waiting()):
            deadline = job.request.deadline
            if deadline is not None and now > deadline and job.cached_tokens is None:
                self._end(job, DeadlineError("The request waited until its deadline; the engine is busy."))

    def _step(self) -> None:
        failed: list[tuple[Job, ServingError]] = []
        parts = self._scheduler.plan(failed)
        for job, error in failed:
            self._end(job, error)
        self._count_waiting()
        if not parts:
            return
        try:
            self._run(parts)
        except Exception as error:
            self._step_apart(parts, error)

    def _run(self, parts: list[Part]) -> None:
        undecided = [part.text.job for part in parts if not part.text.job.is_routed]
        try:
            logits = self._runner.run(parts, self._pool)
        except Exception:
            self._runner.forget_decisions(parts)
            raise
        for job in undecided:
            if job.is_routed and job.adapter is not None and job.route is not None:
                self._pool.store_route(job.adapter, job.request.prompt, job.route)
        self._writer.advance(parts, logits)

    def _step_apart(self, parts: list[Part], error: Exception) -> None:
        """After a failed step, runs each request separately. Only requests that fail again end."""
        _log.warning("A step failed (%s); its requests are run alone.", error)
        for job in dict.fromkeys(part.text.job for part in parts):
            own = [part for part in parts if part.text.job is job]
            try:
                self._run(own)
            except Exception as alone:
                self._end(job, failed(alone))

    def _count_waiting(self) -> None:
        with self._changed:
            self._waiting = len(self._arrived) + sum(1 for _ in self._scheduler.waiting())

    def _end(self, job: Job, error: ServingError | None) -> None:
        self._scheduler.drop(job)
        with self._changed:
            if job.adapter is not None:
                job.adapter.uses -= 1
            self._unfinished.discard(job)
            is_well = error is None and not job.generation.is_cancelled
            self._counts["finished" if is_well else "failed"] += 1
            self._changed.notify_all()
        job.generation.end(error)

    def _stop(self) -> None:
        with self._changed:
            self._is_closing = True  # No request can arrive after this.
        message = "The engine was closed." if self._failure is None else f"The engine has stopped: {self._failure}"
        self._take_arrived()
        for job in list(self._unfinished):
            self._end(job, EngineStoppedError(message))
        while self._commands:
            self._commands.popleft()[1].set_exception(EngineStoppedError(message))
        self._pool.slots.close()
        self._runner.close()


def _ends(backbone: Any) -> frozenset[int]:
    own = getattr(getattr(backbone, "generation_config", None), "eos_token_id", None)
    return frozenset(own if isinstance(own, list | tuple) else [] if own is None else [own])
