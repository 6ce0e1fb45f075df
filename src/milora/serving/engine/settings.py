"""The settings of the engine."""

from __future__ import annotations

from dataclasses import dataclass

from milora_core.errors import MiLoraError


@dataclass(frozen=True)
class EngineSettings:
    """Limits on the engine's batches and memory.

    Args:
        most_texts: Maximum number of texts generated concurrently.
        step_tokens: Maximum number of tokens per step. Longer prompts are prefilled in chunks, together with texts that
            are being generated. A prompt whose routers read more tokens is prefilled in one chunk.
        cache_bytes: Memory for keys and values.
        page_tokens: Tokens per page of the cache. Prompts share whole pages.
        prefix_cache: Whether prompts with the same prefix share its cached pages.
        most_waiting: Maximum number of waiting requests. Further requests are rejected.
        packs_weights: On a CPU, whether to keep a second copy of the linear layers' weights, in the fastest layout for
            small batches.
        adapters_in_memory: Maximum number of adapters in memory. Others are loaded from disk when a request needs them.

    Raises:
        MiLoraError: If a number is below 1.
    """

    most_texts: int = 32
    step_tokens: int = 512
    cache_bytes: int = 2**30
    page_tokens: int = 16
    prefix_cache: bool = True
    packs_weights: bool = True
    most_waiting: int = 1024
    adapters_in_memory: int = 32

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, bool) and value < 1:
                raise MiLoraError(f"{name} must be at least 1; found {value}.")
