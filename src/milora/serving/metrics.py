"""The metrics of `/metrics`, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from milora.serving.requests import EngineStatistics

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_REQUEST = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0)


class Metrics:
    """The counters of the server. The engine's figures are read at each scrape.

    Args:
        statistics: Returns the engine's statistics.
        draining: Whether the server is draining.

    Attributes:
        requests: Finished requests, by tenant, API route and status.
        prompt_tokens: Prompt tokens, by tenant.
        cached_tokens: Prompt tokens read from the prefix cache.
        generated_tokens: New tokens, by tenant.
        first_token_seconds: Time from a request's arrival to its first token.
        per_token_seconds: Mean time between the tokens of a text.
        request_seconds: Time from a request's arrival to the end of its response.
    """

    def __init__(self, statistics: Callable[[], EngineStatistics], draining: Callable[[], bool]) -> None:
        # The creation time of each series is not useful and would double the size of the response.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        tenant = ["tenant"]
        self.requests = Counter(
            "milora_requests", "Requests that ended.", ["tenant", "route", "status"], registry=self.registry
        )
        self.prompt_tokens = Counter("milora_prompt_tokens", "Prompt tokens.", tenant, registry=self.registry)
        self.cached_tokens = Counter(
            "milora_cached_prompt_tokens", "Prompt tokens read from the prefix cache.", tenant, registry=self.registry
        )
        self.generated_tokens = Counter("milora_generated_tokens", "New tokens.", tenant, registry=self.registry)
        self.first_token_seconds = Histogram(
            "milora_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            tenant,
            registry=self.registry,
            buckets=_FIRST_TOKEN,
        )
        self.per_token_seconds = Histogram(
            "milora_time_per_output_token_seconds",
            "Mean time between the tokens of a text.",
            tenant,
            registry=self.registry,
            buckets=_PER_TOKEN,
        )
        self.request_seconds = Histogram(
            "milora_request_seconds",
            "From a request's arrival to the end of its answer.",
            tenant,
            registry=self.registry,
            buckets=_REQUEST,
        )
        self.registry.register(_EngineCollector(statistics, draining))
        ProcessCollector(registry=self.registry)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    def __init__(self, statistics: Callable[[], EngineStatistics], draining: Callable[[], bool]) -> None:
        self._statistics = statistics
        self._draining = draining

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Describes no metrics, because the engine may not run yet at registration."""
        return iter(())

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """The engine's current figures."""
        now = self._statistics()
        for name, what, value in (
            ("milora_requests_waiting", "Requests that have not begun.", now.waiting),
            ("milora_sequences_running", "Texts that are being generated.", now.running),
            ("milora_cache_pages_used", "Cache pages of running texts.", now.cache_pages_used),
            ("milora_cache_pages_cached", "Cache pages that only the prefix cache holds.", now.cache_pages_cached),
            ("milora_cache_pages", "Cache pages.", now.cache_pages_total),
            ("milora_cache_page_tokens", "Tokens of a cache page.", now.page_tokens),
            ("milora_adapters", "Adapters.", now.adapters),
            ("milora_adapters_in_memory", "Adapters whose weights are loaded.", now.adapters_in_memory),
            ("milora_draining", "Whether the server accepts no new requests.", int(self._draining())),
        ):
            yield GaugeMetricFamily(name, what, value=value)
        for name, what, value in (
            ("milora_engine_steps", "Forward passes.", now.steps),
            ("milora_engine_prefix_hit_tokens", "Prompt tokens read from the prefix cache.", now.prefix_hit_tokens),
            ("milora_engine_requests_finished", "Requests that the engine ended well.", now.finished),
            ("milora_engine_requests_failed", "Requests that failed or were cancelled.", now.failed),
            ("milora_engine_preemptions", "Texts whose cache was taken away and computed again.", now.preempted),
        ):
            yield CounterMetricFamily(name, what, value=value)
