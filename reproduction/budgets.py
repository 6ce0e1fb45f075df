"""Equal budgets: finds the size with which each method trains about the same number of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from milora.backbone.shapes import shape_config
from milora.methods import RANK, parameter_counts
from milora_core.errors import MiLoraError

TOLERANCE = 0.05
"""Largest allowed difference between a method's tunable parameters and the target, as a share of the target."""

PAPER_BACKBONES = ("llama-2-7b", "llama-2-13b", "gemma-2b")
"""The shapes of the backbones for which the paper's settings were chosen."""

CLOSE = 0.01
NEIGHBOURHOOD = 6
"""The search covers this many sizes around the expected one, unless a neighbour is within `CLOSE` of the target."""

Settings = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """The field of a configuration that sets a method's size, the paper's value, and the step between values."""

    field: str
    paper: int
    step: int = 1


SIZES: Mapping[str, Size] = {
    "parallel-adapter": Size("bottleneck", 160),
    "learned-adapter": Size("bottleneck", 160),
    "p-tuning-v2": Size("projection_dim", 640),
    "iapt": Size("bottleneck", 320),
    "bitfit": Size("projection_dim", 64),
    "ia3": Size("projection_dim", 128),
    "lora": Size("r", RANK),
    # Half of the initial rank is pruned.
    "adalora": Size("init_r", 2 * RANK, 2),
    "moelora": Size("r", RANK, 8),
    "dora": Size("r", RANK),
    "milora": Size("r", RANK),
    "midora": Size("r", RANK),
}
"""The size of each method. SSP has none: its budget is a number of parameters."""

EXPERTS = 8
"""Number of MOELoRA's experts per module in the paper. Each token uses half of them."""


def paper_backbone(config: Any) -> str | None:
    """The one of [`PAPER_BACKBONES`] with the dimensions of a transformers configuration, or `None`."""
    for name in PAPER_BACKBONES:
        if _dimensions(shape_config(name)) == _dimensions(config):
            return name
    return None


def size_at(name: str, config: Any, budget: str | int) -> Settings:
    """The fields that bring a method within 5 % of a budget of tunable parameters.

    Sizes are the whole numbers nearest to the target. [`milora.methods.parameter_counts`] counts the parameters
    (without DoRA's magnitudes) on a model without weights. SSP's budget is the target. MOELoRA's rank is divided evenly
    among its experts: the paper's eight, or the nearest number for which a rank is near enough. Each token uses half of
    them.

    Args:
        name: One of [`milora.methods.METHODS`].
        config: A transformers configuration.
        budget: `milora` (MiLoRA's parameters at the paper's rank), `paper` (the paper's settings), or a number. On
            the paper's backbones `milora` is `paper`: the paper made the budgets equal by hand.

    Returns:
        The fields; empty if the paper's settings apply.

    Raises:
        MiLoraError: If no size is near enough.
    """
    if budget == "paper" or (budget == "milora" and paper_backbone(config) is not None):
        return {}
    target = parameter_counts("milora", config).tunable if budget == "milora" else int(budget)
    if name == "ssp":
        return _checked(name, {"budget": target}, config, target)
    size = SIZES[name]
    if name != "moelora":
        return _checked(name, {size.field: _nearest(name, size, config, target, {})}, config, target)
    tried: list[tuple[int, Settings]] = []
    # Numbers of experts nearest to the paper's eight come first; of two at the same distance, the smaller comes first.
    for experts in sorted(range(2, 2 * EXPERTS + 1), key=lambda experts: (abs(experts - EXPERTS), experts)):
        shape = {} if experts == EXPERTS else {"num_experts": experts, "top_k": max(experts // 2, 1)}
        of_experts = Size(size.field, experts * max(round(size.paper / experts), 1), experts)
        settings = {size.field: _nearest(name, of_experts, config, target, shape), **shape}
        tried.append((parameter_counts(name, config, **settings).tunable, settings))
        if _is_near(tried[-1][0], target):
            return settings
    raise _none_near(name, *min(tried, key=lambda pair: abs(pair[0] - target)), target)


def _nearest(name: str, size: Size, config: Any, target: int, fixed: Settings) -> int:
    """The size whose count is nearest to the target. The search is around the linear estimate from two counts."""

    @cache
    def count(steps: int) -> int:
        return parameter_counts(name, config, **{size.field: steps * size.step, **fixed}).tunable

    first = max(size.paper // size.step, 1)
    growth = (count(2 * first) - count(first)) / first
    guess = max(round(first + (target - count(first)) / growth), 1)
    # Counts may not be linear or even increasing: the block size of Learned-Adapter's mix must divide the bottleneck.
    for reach in (1, NEIGHBOURHOOD):
        around = range(max(guess - reach, 1), guess + reach + 1)
        best = min(around, key=lambda steps: abs(count(steps) - target))
        if abs(count(best) - target) <= CLOSE * target:
            break
    return best * size.step


def _checked(name: str, settings: Settings, config: Any, target: int) -> Settings:
    tunable = parameter_counts(name, config, **settings).tunable
    if not _is_near(tunable, target):
        raise _none_near(name, tunable, settings, target)
    return settings


def _is_near(tunable: int, target: int) -> bool:
    return abs(tunable - target) <= TOLERANCE * target


def _none_near(name: str, tunable: int, settings: Settings, target: int) -> MiLoraError:
    return MiLoraError(
        f"No size brings {name} within {TOLERANCE:.0%} of {target:,} tunable parameters on this backbone: the nearest "
        f"is {settings}, with {tunable:,}. Leave the method out, or give another budget."
    )


def _dimensions(config: Any) -> tuple[Any, ...]:
    names = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads")
    return tuple(getattr(config, name, None) for name in names)
