"""Measures methods in turn over several rounds and summarises the results."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

BASE = "base"
DISTURBED = 0.15
"""A round is disturbed if the bare backbone's speed differs from its median by more than this share."""

Sample = TypeVar("Sample")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Turn:
    """The case, the round and the method of one measurement."""

    case: str
    round: int
    method: str


@dataclass(frozen=True)
class Rounds(Generic[Sample]):
    """The measurements of a case.

    Attributes:
        samples: By method, one sample per round.
        order: The turns in the order of measurement.
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
    value: Callable[[Sample], float] | None = None,
) -> Rounds[Sample]:
    """Measures A B C, A B C, ..., so other load on the machine affects all methods equally.

    If the bare backbone is among the methods, disturbed rounds (see [`disturbed`]) are measured again, at most `rounds`
    times. Rounds that are still disturbed are left out.

    Args:
        case: The case's name, for progress messages.
        methods: The methods' names.
        rounds: Number of measurements of each method.
        measure: Measures one method once.
        progress: Called with a message about every measurement.
        describe: Describes a sample for the message.
        value: The speed of a sample, to find disturbed rounds. Without it no round is repeated.
    """
    found: list[dict[str, Sample]] = []
    order: list[Turn] = []

    def one_round(number: int, place: int) -> dict[str, Sample]:
        samples = {}
        for name in methods:
            # A collection during a measurement would slow down one method.
            gc.collect()
            gc.disable()
            try:
                samples[name] = measure(name)
            finally:
                gc.enable()
            order.append(Turn(case, number, name))
            progress(f"{case}, round {place + 1}/{rounds}, {name}: {describe(samples[name])}")
        return samples

    def bad_rounds() -> list[int]:
        if value is None or BASE not in methods:
            return []
        return disturbed([value(samples[BASE]) for samples in found])

    found = [one_round(number, number) for number in range(rounds)]
    for number in range(rounds, 2 * rounds):
        bad = bad_rounds()
        if not bad:
            break
        progress(f"{case}, round {bad[0] + 1} was disturbed: measuring it again")
        found[bad[0]] = one_round(number, bad[0])
    left_out = bad_rounds()
    kept = [samples for index, samples in enumerate(found) if index not in left_out]
    return Rounds({name: [samples[name] for samples in kept] for name in methods}, order)


def disturbed(values: Sequence[float]) -> list[int]:
    """The rounds in which the bare backbone's speed differs from its median by more than [`DISTURBED`], worst first.

    For an even number of rounds, the median is the faster of the two middle rounds, because disturbances slow a machine
    down. At least one round is never disturbed.

    Args:
        values: The bare backbone's speeds, one per round.
    """
    median = statistics.median_high(values)
    off = {index: abs(value / median - 1) for index, value in enumerate(values)}
    return sorted((index for index, share in off.items() if share > DISTURBED), key=lambda index: -off[index])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratios(values: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """[`spread`] of the ratios to the reference, round by round."""
    return spread([value / other for value, other in zip(values, reference, strict=True)])


def compared(values: Mapping[str, Sequence[float]], name: str) -> dict[str, Any]:
    """The fields of a row about one method's values: `ratio_to_base`, and `ratios` to every other method."""
    to_others = {other: ratios(values[name], of_other) for other, of_other in values.items() if other != name}
    to_base = ratios(values[name], values["base"])["median"] if "base" in values else None
    return {"ratio_to_base": to_base, "ratios": to_others, "rounds": list(values[name])}


def compared_memory(values: Mapping[str, float], name: str) -> dict[str, Any]:
    """The fields of a row about one method's peak memory."""
    return {
        "peak_memory_mib": values[name],
        "memory_ratios": {other: values[name] / of_other for other, of_other in values.items() if other != name},
    }


def spread_fields(key: str, values: Sequence[float]) -> dict[str, float]:
    """[`spread`] as fields of a row: `key`, `key_low`, `key_high`."""
    found = spread(values)
    return {key: found["median"], f"{key}_low": found["low"], f"{key}_high": found["high"]}
