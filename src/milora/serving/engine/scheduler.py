"""Selects the requests that run and the tokens of each step: fair between tenants, within the cache and a token budget.

Tenants have virtual token counters (Sheng et al. 2024, "Fairness in Serving Large Language Models"). Each counts the
tokens computed for its tenant, and the waiting tenant with the lowest counter is next. A returning tenant's counter is
raised to the lowest counter of the busy tenants, so idle time earns no credit. While all rows are taken, a waiting
tenant with less than an equal share of the rows preempts the latest request of a tenant with more than its share. The
preempted request waits again, and its pages stay in the prefix cache while there is space.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from milora.serving.engine.adapters import AdapterPool
from milora.serving.engine.cache import PagePool
from milora.serving.engine.sequence import Job, Text
from milora.serving.requests import InvalidRequestError, ServingError
from milora_core.errors import MiLoraError

NEW_TOKEN_COST = 2
"""Cost of a new token, as in the paper, where a prompt token costs 1: each new token needs a separate step."""


@dataclass(frozen=True)
class Part:
    """The next `count` tokens of a text, computed in one step."""

    text: Text
    count: int

    @property
    def gives_token(self) -> bool:
        """Whether the step gives the text's next token."""
        return self.count == self.text.remaining


class Scheduler:
    """Waiting and running requests. Only the engine's thread may use it.

    Args:
        pages: The cache's pages.
        adapters: The adapters.
        most_rows: Maximum number of texts generated concurrently.
        step_tokens: Maximum number of tokens per step, exceeded only by a single prompt with more deciding tokens.
        shares_prefixes: Whether to use the prefix cache.

    Attributes:
        running: Requests that have rows, in the order in which they started.
        preempted: Number of preempted texts.
        prefix_hit_tokens: Prompt tokens read from the prefix cache.
    """

    def __init__(
        self, pages: PagePool, adapters: AdapterPool, most_rows: int, step_tokens: int, *, shares_prefixes: bool
    ) -> None:
        self._pages = pages
        self._adapters = adapters
        self._most_rows = most_rows
        self._step_tokens = step_tokens
        self._shares_prefixes = shares_prefixes
        self._waiting: dict[str, deque[Job]] = {}
        self._service: dict[str, float] = defaultdict(float)
        self.running: list[Job] = []
        self.preempted = 0
        self.prefix_hit_tokens = 0

    # ------------------------------------------------------------------ queue

    def add(self, job: Job) -> None:
        """Adds a new request to its tenant's queue."""
        busy = [self._service[tenant] for tenant in self._busy()]
        if job.tenant not in self._busy() and busy:
            self._service[job.tenant] = max(self._service[job.tenant], min(busy))
        self._waiting.setdefault(job.tenant, deque()).append(job)

    def waiting(self) -> Iterator[Job]:
        """Yields all waiting requests."""
        for queue in list(self._waiting.values()):
            yield from list(queue)

    def drop(self, job: Job) -> None:
        """Removes a request and frees its rows and pages."""
        if job in self.running:
            self._stop(job)
            return
        queue = self._waiting.get(job.tenant)
        if queue is not None and job in queue:
            queue.remove(job)
            if not queue:
                del self._waiting[job.tenant]

    def charge(self, part: Part) -> None:
        """Adds a computed part to its tenant's counter."""
        self._service[part.text.job.tenant] += NEW_TOKEN_COST if part.count == 1 else part.count

    def release(self, text: Text) -> None:
        """Releases a text's pages."""
        self._pages.release(text.pages)
        text.pages, text.computed, text.known, text.node, text.logits = [], 0, 0, None, None

    def _busy(self) -> set[str]:
        return {*self._waiting, *(job.tenant for job in self.running)}

    # ------------------------------------------------------------------- step

    def plan(self, failed: list[tuple[Job, ServingError]]) -> list[Part]:
        """Plans the next step.

        Args:
            failed: Receives the requests that cannot start, with the reason.
        """
        self._admit(failed)
        parts: list[Part] = []
        decoding = [text for job in self.running for text in job.texts if text.remaining == 1]
        for text in decoding:
            if text.job in self.running and self._make_room(text, 1):
                parts.append(Part(text, 1))
        budget = self._step_tokens - len(parts)
        has_prompt = False
        for job in sorted(self.running, key=lambda each: self._service[each.tenant]):
            for text in job.texts:
                if text.remaining <= 1 or job not in self.running or (budget <= 0 and has_prompt):
                    continue
                count = min(text.remaining, max(budget, 1))
                needed = self._deciding_tokens(text)
                if needed is not None and count < needed:
                    if has_prompt:
                        continue  # Its deciding tokens exceed the rest of this step.
                    count = needed
                if self._make_room(text, count):
                    parts.append(Part(text, count))
                    budget -= count
                    has_prompt = True
        # Drops the parts of requests that were preempted after they had been planned.
        planned = [part for part in parts if part.text.job in self.running]
        return sorted(planned, key=lambda part: part.count > 1)

    @staticmethod
    def _deciding_tokens(text: Text) -> int | None:
        """Minimum size of the text's next piece, so it contains all tokens that the routers read."""
        deciding = text.job.deciding
        if deciding is None or deciding[1] == 1:
            return None
        return deciding[0] + deciding[1] - text.computed

    def _admit(self, failed: list[tuple[Job, ServingError]]) -> None:
        blocked: set[str] = set()
        is_full = False
        while candidates := [tenant for tenant in self._waiting if tenant not in blocked]:
            tenant = min(candidates, key=lambda each: self._service[each])
            job = self._waiting[tenant][0]
            is_poor = self._rows(tenant) + job.rows <= self._equal_part()
            if not self._has_adapter(job) or (is_full and not is_poor):
                blocked.add(tenant)
            elif not self._has_rows(job, is_poor=is_poor) or not self._has_pages(job):
                # Tenants with their share of the rows wait too, or a request for many rows would never start.
                blocked.add(tenant)
                is_full = True
            else:
                self.drop(job)
                try:
                    self._begin(job)
                except ServingError as error:
                    failed.append((job, error))

    def _rows(self, tenant: str | None = None) -> int:
        return sum(job.rows for job in self.running if tenant is None or job.tenant == tenant)

    def _equal_part(self) -> int:
        """The number of rows in an equal share."""
        return max(self._most_rows // len(self._busy()), 1)

    def _has_rows(self, job: Job, *, is_poor: bool) -> bool:
        """Whether a request gets rows, if needed by preempting a tenant with more than an equal share."""
        while self._rows() + job.rows > self._most_rows:
            richest = max((other.tenant for other in self.running), key=self._rows)
            if not is_poor or richest == job.tenant or self._rows(richest) <= self._equal_part():
                return False
            self._preempt(next(other for other in reversed(self.running) if other.tenant == richest))
        return True

    def _has_adapter(self, job: Job) -> bool:
        return job.adapter is None or self._adapters.is_loaded(job.adapter) or self._adapters.can_load()

    def _has_pages(self, job: Job) -> bool:
        """Whether the cache has enough pages for the tokens that a request computes before its next token."""
        size = self._pages.page_tokens
        needed = sum(-(-len(text.tokens) // size) for text in job.texts)
        return not self.running or needed <= self._pages.available

    def _begin(self, job: Job) -> None:
        if job.adapter is not None:
            self._adapters.load(job.adapter)
            if job.route is None:
                try:
                    prompt = job.request.prompt
                    job.route, job.is_routed = self._adapters.new_route(job.adapter, job.request.route, prompt)
                except MiLoraError as error:
                    raise InvalidRequestError(str(error)) from error
            job.route.adapter = job.adapter.slot
            job.adapter.running += 1
        self.running.append(job)
        for text in job.texts:
            self._read_prefix(text)
        if job.cached_tokens is None:
            job.cached_tokens = job.texts[0].computed
            self.prefix_hit_tokens += job.cached_tokens

    def _stop(self, job: Job) -> None:
        self.running.remove(job)
        for text in job.texts:
            self.release(text)
        if job.adapter is not None:
            job.adapter.running -= 1

    # ------------------------------------------------------------------ cache

    def _read_prefix(self, text: Text) -> None:
        """Reuses cached pages for the beginning of a text. The last token is always computed."""
        salt = text.job.salt()
        if salt is None:
            return
        limit = text.job.cacheable(len(text.tokens) - 1) if self._shares_prefixes else 0
        text.pages, text.node = self._pages.match(salt, text.tokens, limit)
        for page in text.pages:
            self._pages.share(page)
        text.known = len(text.pages)
        text.computed = len(text.pages) * self._pages.page_tokens

    def remember(self, text: Text) -> None:
        """Adds a text's full pages to the prefix cache."""
        salt = text.job.salt()
        if salt is None or not self._shares_prefixes:
            return
        size = self._pages.page_tokens
        if not text.known:
            text.node = self._pages.root(salt)
        while (end := (text.known + 1) * size) <= text.job.cacheable(text.computed):
            tokens = text.tokens[text.known * size : end]
            text.node = self._pages.remember(text.pages[text.known], text.node, tokens)
            text.known += 1

    def _make_room(self, text: Text, count: int) -> bool:
        """Allocates pages for a text's next tokens, preempting requests if necessary. Returns whether it succeeded."""
        size = self._pages.page_tokens
        needed = -(-(text.computed + count) // size)
        while needed - len(text.pages) > self._pages.available:
            victim = self._victim()
            self._preempt(victim)
            if victim is text.job:
                return False
        while len(text.pages) < needed:
            text.pages.append(self._pages.take())
        return True

    def _victim(self, spared: Job | None = None) -> Job:
        """The latest request of the tenant with the most rows."""
        others = [job for job in self.running if job is not spared]
        richest = max((job.tenant for job in others), key=self._rows)
        return next(job for job in reversed(others) if job.tenant == richest)

    def _preempt(self, job: Job) -> None:
        self.preempted += len(job.texts)
        self._stop(job)
        self._waiting.setdefault(job.tenant, deque()).appendleft(job)

    def branch(self, parents: Sequence[Text]) -> list[tuple[int, int]]:
        """Replaces a request's texts by new ones that continue them and share their full pages.

        Args:
            parents: The text that each new text continues. All tokens of the request's texts must be computed.

        Returns:
            Pages to copy, (from, to). A partly filled last page is not shared.
        """
        job, size = parents[0].job, self._pages.page_tokens
        for text in job.texts:
            if text not in parents:
                self.release(text)
        copied: list[tuple[int, int]] = []
        texts: list[Text] = []
        taken: set[Text] = set()
        for index, parent in enumerate(parents):
            whole = parent.computed // size
            text = Text(job, index, list(parent.tokens), parent.computed, list(parent.pages[:whole]))
            text.known, text.node = parent.known, parent.node
            if parent.computed % size:
                if parent in taken:
                    while not self._pages.available:
                        self._preempt(self._victim(job))
                    text.pages.append(self._pages.take())
                    copied.append((parent.pages[whole], text.pages[whole]))
                else:
                    text.pages.append(parent.pages[whole])
            for page in text.pages if parent not in taken else text.pages[:whole]:
                self._pages.share(page)
            taken.add(parent)
            texts.append(text)
        for parent in taken:
            self.release(parent)
        job.texts = texts
        return copied
