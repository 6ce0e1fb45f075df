"""Requests to the embedded engine, its errors, and what it reports about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from milora_core.errors import MiLoraError
from milora_core.routing import Route


class ServingError(MiLoraError):
    """A request that the engine rejects or aborts.

    Attributes:
        kind: What happened, for callers that map errors to status codes.
    """

    kind: ClassVar[str] = "error"


class InvalidRequestError(ServingError):
    """A value of the request is out of range, or its options are incompatible."""

    kind = "invalid_request"


class PromptTooLongError(InvalidRequestError):
    """Prompt and new tokens do not fit the backbone's positions or the cache."""

    kind = "prompt_too_long"


class UnknownAdapterError(ServingError):
    """There is no adapter with this name."""

    kind = "unknown_adapter"


class QueueFullError(ServingError):
    """The queue is full. Try again later."""

    kind = "queue_full"


class DeadlineError(ServingError):
    """The request was still waiting at its deadline."""

    kind = "deadline"


class EngineStoppedError(ServingError):
    """The engine is closing or has stopped."""

    kind = "engine_stopped"


class NumericalError(ServingError):
    """The backbone or the adapter produced NaN or infinity for this request."""

    kind = "numerical"


class FailedRequestError(ServingError):
    """The computation of this request raised an error, also when it ran alone."""

    kind = "failed"


class AdapterError(ServingError):
    """The folder has no adapter that the engine can serve."""

    kind = "invalid_adapter"


class AdapterInUseError(ServingError):
    """Running or waiting requests use the adapter, or its name is taken."""

    kind = "adapter_in_use"


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of a request. Names and meanings are vLLM's.

    Args:
        max_tokens: Maximum number of tokens of a text.
        temperature: Tokens are sampled from `softmax(logits / temperature)`. 0 means greedy sampling.
        top_p: Samples from the most probable tokens whose cumulative probability reaches this value.
        top_k: Samples from the `top_k` most probable tokens; 0 means all.
        min_p: Minimum probability of a token, relative to the most probable token's.
        seed: Makes sampling reproducible, independent of other requests.
        stop: Texts that end the generation.
        stop_token_ids: Tokens that end the generation.
        ignore_eos: Continue after an end-of-sequence token, up to `max_tokens`.
        n: Number of texts. With beam search, the number of beams. All beams are returned, the best first.
        logprobs: Number of alternatives for each token's log-probability; `None` for no log-probabilities.
        presence_penalty: Subtracted from the logits of tokens already in the text.
        frequency_penalty: Subtracted from the logits of tokens already in the text, once per occurrence.
        repetition_penalty: Divides positive logits, and multiplies negative logits, of tokens already in the prompt or
            the text.
        use_beam_search: Beam search with `n` beams, as transformers' `generate(num_beams=n)`.
        length_penalty: A beam's score is its log-probability divided by its length to this power.
        include_stop_str_in_output: Whether the text includes the stop text that ended it.

    Raises:
        InvalidRequestError: If a value is out of range.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    use_beam_search: bool = False
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        def check(name: str, is_right: bool, wanted: str) -> None:
            if not is_right:
                raise InvalidRequestError(f"{name} must be {wanted}; found {getattr(self, name)!r}.")

        check("max_tokens", self.max_tokens >= 1, "at least 1")
        check("temperature", 0 <= self.temperature < float("inf"), "at least 0 and finite")
        check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        check("top_k", self.top_k >= 0, "at least 0 (0: all tokens)")
        check("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
        check("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "a whole number of 64 bits")
        check("stop", all(self.stop), "texts that are not empty")
        check("n", self.n >= 1, "at least 1")
        check("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "between 0 and 20")
        check("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2")
        check("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2")
        check("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0 and finite")
        check("length_penalty", abs(self.length_penalty) < float("inf"), "finite")
        if self.use_beam_search:
            self._check_beams()

    def _check_beams(self) -> None:
        neutral = {
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "logprobs": None,
            "stop": (),
        }
        for name, value in neutral.items():
            if getattr(self, name) != value:
                raise InvalidRequestError(f"Beam search takes no {name}; found {getattr(self, name)!r}.")

    @property
    def is_greedy(self) -> bool:
        """Whether each token is the most probable one."""
        return self.temperature == 0


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt to continue.

    Args:
        prompt: Token ids, from the adapter's own tokenizer and chat template.
        sampling: The sampling parameters.
        adapter: The adapter's name; `None` for the bare backbone.
        tenant: The tenant that sends the request. Tenants get equal shares of the engine.
        route: A route of one row that replaces the routers' decision.
        return_route: Whether the first event has the route.
        deadline: Seconds of `time.monotonic()`. A request that is still waiting then ends with [`DeadlineError`].
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    adapter: str | None = None
    tenant: str = ""
    route: Route | None = None
    return_route: bool = False
    deadline: float | None = None


@dataclass(frozen=True)
class AdapterInfo:
    """A registered adapter.

    Attributes:
        name: The adapter's name.
        folder: The folder that it is loaded from.
        kind: PEFT's name for its method, `"MILORA"` or `"LORA"`.
        in_memory: Whether its weights are in memory. If not, they are loaded when a request needs them.
        requests: Number of running or waiting requests that use it.
    """

    name: str
    folder: Path
    kind: str
    in_memory: bool
    requests: int


@dataclass(frozen=True)
class EngineStatistics:
    """A snapshot of the engine. Counters start when the engine is created.

    Attributes:
        waiting: Requests that have not started.
        running: Texts being generated (a request with `n` texts counts `n` times).
        cache_pages_used: Pages of the key-value cache that running texts use.
        cache_pages_cached: Pages that only the prefix cache uses. They are evicted when others need them.
        cache_pages_total: Total number of pages.
        page_tokens: Tokens per page.
        prefix_hit_tokens: Prompt tokens read from the prefix cache.
        prompt_tokens: Prompt tokens of all requests, by tenant.
        generated_tokens: New tokens, by tenant.
        steps: Forward passes.
        finished: Requests that finished without an error.
        failed: Requests that ended with an error or were cancelled.
        preempted: Texts that lost their cache to other texts and recomputed it.
        adapters_in_memory: Adapters whose weights are loaded.
        adapters: All adapters.
    """

    waiting: int
    running: int
    cache_pages_used: int
    cache_pages_cached: int
    cache_pages_total: int
    page_tokens: int
    prefix_hit_tokens: int
    prompt_tokens: Mapping[str, int]
    generated_tokens: Mapping[str, int]
    steps: int
    finished: int
    failed: int
    preempted: int
    adapters_in_memory: int
    adapters: int
