"""The interface of progress bars for long operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Watch = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""Wraps an iterable in a progress bar. The arguments are the iterable, a description and the number of items."""
