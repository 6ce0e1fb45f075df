"""How what takes long shows that it goes on, whatever shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Watch = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""Wraps an iterable in a progress bar, given what it is and how many come."""
