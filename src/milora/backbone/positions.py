"""How long a text may be for a backbone."""

from __future__ import annotations

from typing import Any

_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
"""What configurations call it; transformers' own have the first name, but for MPT's."""


def positions_of(model: Any) -> int | None:
    """How many tokens a model has positions for, prompt and new tokens together; `None` where it sets no limit."""
    config = model.config
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    found = (getattr(config, field, None) for field in _FIELDS)
    return next((positions for positions in found if isinstance(positions, int)), None)
