"""Tasks and methods of other distributions, found by their entry points."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any

from milora_core.errors import MiLoraError

TASK_GROUP = "milora.tasks"
METHOD_GROUP = "milora.methods"


@cache
def plugins(group: str) -> dict[str, Any]:
    """The objects that installed distributions offer, by name; loaded once per process.

    Args:
        group: [`TASK_GROUP`] or [`METHOD_GROUP`].

    Raises:
        MiLoraError: An entry point cannot be loaded, or two have the same name. The message names the distribution.
    """
    found: dict[str, Any] = {}
    for entry in entry_points(group=group):
        distribution = entry.dist.name if entry.dist is not None else entry.value
        if entry.name in found:
            raise MiLoraError(f"{distribution} offers {entry.name!r} ({group}), which another distribution offers too.")
        try:
            found[entry.name] = entry.load()
        except Exception as error:
            raise MiLoraError(
                f"{entry.name!r} ({group}) of {distribution} cannot be loaded: {type(error).__name__}: {error}"
            ) from error
    return found
