"""Finds the modules of a backbone's blocks that a configuration selects."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from milora_core.errors import MiLoraError

Candidates = Mapping[str, Mapping[str, nn.Module]]
"""Block -> relative path -> module: the modules that a method can adapt, in order."""


def listed_modules(modules: list[str] | dict[str, list[str]], candidates: Candidates) -> dict[str, list[str]]:
    """The modules that a saved adapter's configuration lists, by block.

    Args:
        modules: Relative paths, for all blocks or by block.
        candidates: The modules of this backbone.

    Raises:
        MiLoraError: If a listed module does not exist.
    """
    by_block = modules if isinstance(modules, dict) else dict.fromkeys(candidates, modules)
    for path, names in by_block.items():
        missing = [name for name in names if name not in candidates.get(path, {})]
        if missing:
            found = f"has {list(candidates[path])}" if path in candidates else "has no such block"
            raise MiLoraError(
                f"The adapter is for another backbone: it has {missing} in {path}, and this backbone {found}."
            )
    return by_block


def targeted_modules(config: Any, candidates: Candidates) -> dict[str, list[str]]:
    """The candidates that a configuration's `target_modules` matches, by block, with PEFT's rules.

    Args:
        config: A PEFT configuration. `target_modules` of `None` or `all-linear` matches every candidate.
        candidates: The modules of this backbone.

    Raises:
        MiLoraError: If no candidate matches.
    """
    matcher = copy.copy(config)
    if matcher.target_modules in (None, "all-linear"):
        # Names instead of a regular expression, because PEFT ignores layers_to_transform with the latter.
        matcher.target_modules = list(dict.fromkeys(name for names in candidates.values() for name in names))
    chosen = {
        path: [name for name in names if check_target_module_exists(matcher, f"{path}.{name}")]
        for path, names in candidates.items()
    }
    if not any(chosen.values()):
        named = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules or ())
        path, names = next(iter(candidates.items()))
        raise MiLoraError(
            f"target_modules={named!r} matches no linear module of the blocks ({path}, ...). They have {list(names)}."
        )
    return chosen
