"""How the report writes lists and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`; empty for nothing."""
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1] if names else ""


def value_text(value: Any) -> str:
    """A number without needless digits; anything else as it prints."""
    return f"{value:g}" if isinstance(value, float) else str(value)
