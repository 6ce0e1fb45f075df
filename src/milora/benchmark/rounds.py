"""Methods in turn, round after round, and what is said of the numbers that come out."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Sample = TypeVar("Sample")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Turn:
    """One measurement's place: which round of which case, and whose turn it was."""

    case: str
    round: int
    method: str


@dataclass(frozen=True)
class Rounds(Generic[Sample]):
    """What was measured.

    Attributes:
        samples: By method, one sample a round.
        order: The turns as they were taken.
    """

    samples: Mapping[str, list[Sample]]
    order: list[Turn]


def in_turn(
    case: str,
    methods: Sequence[str],
    rounds: int,
    measure: Callable[[str], Sample],
    progress: Progress,
    describe: Callable[[Sample], str] = str,
) -> Rounds[Sample]:
    """Measures A B C, A B C, ..., so that whatever else the machine does meets all methods alike.

    Args:
        case: What is measured, for the progress.
        methods: Names.
        rounds: How often each is measured.
        measure: Measures one method once.
        progress: Is told of every measurement.
        describe: What to tell of it.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in methods}
    order: list[Turn] = []
    for number in range(rounds):
        for name in methods:
            # A collection that came in the middle of a measurement would be one method's bad luck.
            gc.collect()
            gc.disable()
            try:
                sample = measure(name)
            finally:
                gc.enable()
            samples[name].append(sample)
            order.append(Turn(case, number, name))
            progress(f"{case}, round {number + 1}/{rounds}, {name}: {describe(sample)}")
    return Rounds(samples, order)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratios(values: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """[`spread`] of the ratios, each to the reference of the same round."""
    return spread([value / other for value, other in zip(values, reference, strict=True)])


def compared(values: Mapping[str, Sequence[float]], name: str) -> dict[str, Any]:
    """What a row says of one method's values: `ratio_to_base`, and in `ratios` those to every other method."""
    to_others = {other: ratios(values[name], of_other) for other, of_other in values.items() if other != name}
    to_base = ratios(values[name], values["base"])["median"] if "base" in values else None
    return {"ratio_to_base": to_base, "ratios": to_others, "rounds": list(values[name])}


def compared_memory(values: Mapping[str, float], name: str) -> dict[str, Any]:
    """What a row says of one method's peak memory."""
    return {
        "peak_memory_mib": values[name],
        "memory_ratios": {other: values[name] / of_other for other, of_other in values.items() if other != name},
    }


def spread_fields(key: str, values: Sequence[float]) -> dict[str, float]:
    """[`spread`] as fields of a row: `key`, `key_low`, `key_high`."""
    found = spread(values)
    return {key: found["median"], f"{key}_low": found["low"], f"{key}_high": found["high"]}
