"""Equal budgets: finds the size with which each method trains about the same number of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from milora.backbone.shapes import shape_config
from milora.methods import RANK, parameter_counts
from milora_core.errors import MiLoraError
from reproduction.settings import Settings

TOLERANCE = 0.05
"""Largest allowed difference between a method's tunable parameters and the target, as a share of the target."""

PAPER_BACKBONES = ("llama-2-7b", "llama-2-13b", "gemma-2b")
"""The shapes of the backbones for which the paper's settings were chosen."""

CLOSE = 0.01
NEIGHBOURHOOD = 6
"""The search covers this many sizes around the expected one, unless a neighbour is within `CLOSE` of the target."""


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
"""Number of MOELoRA's experts per module in the paper."""


def is_paper_backbone(config: Any) -> bool:
    """Whether a transformers configuration has the dimensions of one of [`PAPER_BACKBONES`]."""
    names = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads")
    shapes = map(shape_config, PAPER_BACKBONES)
    return any(all(getattr(config, name, None) == getattr(shape, name) for name in names) for shape in shapes)


def size_at(name: str, config: Any, budget: str | int) -> Settings:
    """The fields that bring a method within 5 % of a budget of tunable parameters; empty for the paper's settings.

    Sizes are the whole numbers nearest to the target. [`milora.methods.parameter_counts`] counts the parameters
    (without DoRA's magnitudes) on a model without weights. SSP's budget is the target. MOELoRA's rank is divided evenly
    among its experts: the paper's eight, or the nearest number for which a rank is near enough. Each token uses half of
    them.

    `budget` is `milora` (MiLoRA's parameters at the paper's rank), `paper` (the paper's settings), or a number. On the
    paper's backbones `milora` is `paper`: the paper made the budgets equal by hand.

    Raises a [`MiLoraError`] if no size is near enough.
    """
    if budget == "paper" or (budget == "milora" and is_paper_backbone(config)):
        return {}
    target = parameter_counts("milora", config).tunable if budget == "milora" else int(budget)
    tried: list[tuple[int, Settings]] = []
    for settings in _candidates(name, config, target):
        tried.append((parameter_counts(name, config, **settings).tunable, settings))
        if abs(tried[-1][0] - target) <= TOLERANCE * target:
            return settings
    tunable, settings = min(tried, key=lambda pair: abs(pair[0] - target))
    raise MiLoraError(
        f"No size brings {name} within {TOLERANCE:.0%} of {target:,} tunable parameters on this backbone: the nearest "
        f"is {settings}, with {tunable:,}. Leave the method out, or give another budget."
    )


def _candidates(name: str, config: Any, target: int) -> Iterator[Settings]:
    """The best size of each shape of a method, preferred shapes first. Only MOELoRA has several shapes."""
    if name == "ssp":
        yield {"budget": target}
    elif name != "moelora":
        yield {SIZES[name].field: _nearest(name, SIZES[name], config, target, {})}
    else:
        size = SIZES[name]
        # Numbers of experts nearest to the paper's eight come first; of two at the same distance, the smaller.
        for experts in sorted(range(2, 2 * EXPERTS + 1), key=lambda experts: (abs(experts - EXPERTS), experts)):
            shape = {} if experts == EXPERTS else {"num_experts": experts, "top_k": max(experts // 2, 1)}
            of_experts = Size(size.field, experts * max(round(size.paper / experts), 1), experts)
            yield {size.field: _nearest(name, of_experts, config, target, shape), **shape}


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
