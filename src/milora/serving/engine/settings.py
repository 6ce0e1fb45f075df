"""What an operator can choose of the engine."""

from __future__ import annotations

from dataclasses import dataclass

from milora_core.errors import MiLoraError


@dataclass(frozen=True)
class EngineSettings:
    """How much the engine does at once, and the memory it takes.

    Args:
        most_texts: The most texts that are generated at once.
        step_tokens: The most tokens of a step; longer prompts are read in pieces, beside texts that are being
            generated. A prompt whose routers read more tokens than that is read in one piece.
        cache_bytes: Memory for keys and values.
        page_tokens: Tokens of a page of the cache; prompts share whole pages.
        prefix_cache: Whether prompts with the same beginning share what was computed of it.
        most_waiting: The most requests that wait; more are refused.
        packs_weights: On a CPU, whether the linear layers' weights are kept a second time, in the layout in which small
            batches are multiplied fastest.
        adapters_in_memory: The most adapters in memory; the others are read from disk when they are needed.

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
