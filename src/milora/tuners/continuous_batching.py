"""Refuses transformers' continuous batching, which packs the prompts of several requests into one row."""

from __future__ import annotations

from typing import Any, NoReturn

from milora_core.errors import MiLoraError


class NoContinuousBatching:
    """A tuner that refuses continuous batching.

    transformers runs it in a thread that only logs errors of a forward pass and returns empty texts, so the error must
    be raised before.
    """

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported.

        Raises:
            MiLoraError: Always: a packed row has several prompts, but each row has exactly one route.
        """
        raise MiLoraError(
            "Continuous batching (generate_batch) packs several prompts into one row, but each row has exactly one "
            "route: call "
            "generate with a padded batch, or milora.inference.generation.generate_texts."
        )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as [`NoContinuousBatching.generate_batch`]."""
        self.generate_batch()

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as [`NoContinuousBatching.generate_batch`]."""
        self.generate_batch()
