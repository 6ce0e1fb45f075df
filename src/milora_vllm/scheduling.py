"""Scheduler changes: a prompt's deciding tokens are never split between steps, and cached blocks are reused only by
requests with the same route."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from milora_vllm.adapter import Routing, request_routing

KNOWN_ROUTES = 16384
"""Number of routes that the scheduler assumes to be known. Workers keep twice as many, so they have all of these."""

_UNSET = object()


def routing_of(request: Any) -> Routing | None:
    """The routing of a vLLM request, computed once."""
    found = request.__dict__.get("_milora_routing", _UNSET)
    if found is _UNSET:
        found = request._milora_routing = request_routing(request)
    return found  # type: ignore[no-any-return]


def with_routes(extra_keys: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps vLLM's `generate_block_hash_extra_keys` and adds the route.

    - All tokens adapted: the first block's hash contains the routing's key, so the hashes of all later blocks do too.
    - Late adaptation: blocks entirely before the last prompt token are hashed as the base model's, so all adapters and
      the base model share them. Other blocks' hashes contain the adapter and the prompt's length.
    """

    def routed(request: Any, start: int, end: int, start_mm: int) -> Any:
        keys, next_mm = extra_keys(request, start, end, start_mm)
        routing = routing_of(request)
        if routing is None:
            return keys, next_mm
        if routing.late and end <= routing.adapted:
            keys = tuple(key for key in keys or () if key[0] != "lora")
        elif routing.late or start == 0:
            keys = (*(keys or ()), ("cache_salt", routing.cache_key))
        return keys or None, next_mm

    return routed


class RoutedScheduling:
    """Mixed into vLLM's scheduler. It changes nothing until the first request with a MiLoRA adapter."""

    _known: OrderedDict[bytes, int] | None = None
    """Key of each route -> the step in which it was decided; `None` before the first MiLoRA request."""

    def add_request(self, request: Any) -> None:
        """See vLLM's `Scheduler`."""
        if self._known is None and routing_of(request) is not None:
            self._begin()
        super().add_request(request)  # type: ignore[misc]

    def _begin(self) -> None:
        self._known = OrderedDict()
        # Makes vLLM call the hook below for every chunk. Models that need the hook's original work still get it.
        self._aligns = self.need_mamba_block_aligned_split  # type: ignore[has-type]
        self.need_mamba_block_aligned_split = True
        # The hook applies the threshold instead, and never splits deciding tokens.
        config = self.scheduler_config  # type: ignore[attr-defined]
        self._threshold = config.long_prefill_token_threshold
        config.long_prefill_token_threshold = 0

    def _is_known(self, routing: Routing) -> bool:
        """Whether an earlier step decided the route. The current step may still be scheduled differently."""
        assert self._known is not None
        step: int = self.current_step  # type: ignore[attr-defined]
        return self._known.get(routing.key, step) < step

    def _get_local_prefix_cache_hit(self, request: Any) -> Any:
        """Uses cached blocks beyond the first deciding token only if the workers know the route."""
        routing = routing_of(request)
        if routing is not None:
            # The last token is always computed.
            could_skip = request.num_tokens - 1 > routing.first
            request.skip_reading_prefix_cache = request.get_skip_reading_prefix_cache() or (
                could_skip and not self._is_known(routing)
            )
        return super()._get_local_prefix_cache_hit(request)  # type: ignore[misc]

    def _mamba_block_aligned_split(self, request: Any, tokens: int, local: int = 0, external: int = 0) -> int:
        """Number of the request's next `tokens` tokens to compute; 0 makes it wait for a step with more room."""
        if self._known is None:  # vLLM calls the hook for its own work: a hybrid model without MiLoRA adapters.
            split: int = super()._mamba_block_aligned_split(request, tokens, local, external)  # type: ignore[misc]
            return split
        start, routing = request.num_computed_tokens + local + external, routing_of(request)
        needed = 0
        if routing is not None and start <= routing.first < start + tokens and not self._is_known(routing):
            needed = routing.end - start
            if tokens < needed:
                return 0
        limit = self._long_prefill_threshold()
        if limit and tokens > limit:
            tokens = max(limit, needed)
        if self._aligns:
            tokens = super()._mamba_block_aligned_split(request, tokens, local, external)  # type: ignore[misc]
        return tokens

    def _long_prefill_threshold(self) -> int:
        """vLLM's rule for `--long-prefill-token-threshold`."""
        requests = sum(self.get_request_counts())  # type: ignore[attr-defined]
        if requests <= 1 or not self._threshold:
            return 0
        threshold: int = self._threshold
        if self.adaptive_long_prefill_threshold:  # type: ignore[attr-defined]
            threshold = max(threshold, self.max_num_scheduled_tokens // requests)  # type: ignore[attr-defined]
        return threshold

    def _update_after_schedule(self, output: Any) -> None:
        """Records the routes that this step decides or uses. The step's chunks are final only here."""
        if self._known is not None:
            for name, tokens in output.num_scheduled_tokens.items():
                request = self.requests[name]  # type: ignore[attr-defined]
                routing, start = routing_of(request), request.num_computed_tokens
                if routing is not None and start < request.num_prompt_tokens and start + tokens >= routing.end:
                    self._note(routing)
        super()._update_after_schedule(output)  # type: ignore[misc]

    def _note(self, routing: Routing) -> None:
        assert self._known is not None
        # A known key keeps its step, so its requests may be scheduled again at once.
        self._known.setdefault(routing.key, self.current_step)  # type: ignore[attr-defined]
        self._known.move_to_end(routing.key)
        if len(self._known) > KNOWN_ROUTES:
            self._known.popitem(last=False)
