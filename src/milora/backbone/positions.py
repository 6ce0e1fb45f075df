"""The maximum length of a text for a backbone."""

from __future__ import annotations

from typing import Any

_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
"""Names in configurations; those of transformers use the first name, except MPT."""


def positions_of(model: Any) -> int | None:
    """The number of positions of a model, for prompt and new tokens together; `None` if there is no limit."""
    config = model.config
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    found = (getattr(config, field, None) for field in _FIELDS)
    return next((positions for positions in found if isinstance(positions, int)), None)
