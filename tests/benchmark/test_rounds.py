"""Methods take turns. Rounds on a disturbed machine are measured again and never reported."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from milora.benchmark.rounds import Rounds, disturbed, in_turn


def measured(base: list[float], rounds: int) -> Rounds[float]:
    """Rounds of the backbone and of a method whose samples are 0, 1, 2, ..."""
    speeds: Iterator[float] = iter(base)
    counter = iter(range(100))
    return in_turn(
        "case",
        ["base", "milora"],
        rounds,
        lambda name: next(speeds) if name == "base" else float(next(counter)),
        lambda line: None,
        value=float,
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([10, 10, 11.4], []),
        ([10, 10, 11.6], [2]),
        ([10, 4, 10, 7], [1, 3]),
        ([10, 20], [0]),
        ([10], []),
        # The measured rounds of Table 4 with three beams.
        ([4.48, 2.16, 2.51, 4.73, 4.15], [1, 2]),
    ],
)
def test_a_round_is_disturbed_if_the_backbone_is_off_its_median(values: list[float], expected: list[int]) -> None:
    assert disturbed(values) == expected


def test_a_disturbed_round_is_measured_again_in_its_place() -> None:
    found = measured([10, 4, 10, 10.5], 3)
    assert found.samples == {"base": [10, 10.5, 10], "milora": [0, 3, 2]}
    assert [(turn.round, turn.method) for turn in found.order[-2:]] == [(3, "base"), (3, "milora")]


def test_what_stays_disturbed_is_left_out() -> None:
    # At most twice as many rounds as requested.
    found = measured([10, 4, 10, 4, 4, 4], 3)
    assert found.samples == {"base": [10, 10], "milora": [0, 2]}


def test_without_a_backbone_or_a_value_nothing_is_repeated() -> None:
    speeds = iter([10.0, 1.0])
    found = in_turn("case", ["base"], 2, lambda name: next(speeds), lambda line: None)
    assert found.samples == {"base": [10.0, 1.0]}
    speeds = iter([10.0, 1.0])
    found = in_turn("case", ["lora"], 2, lambda name: next(speeds), lambda line: None, value=float)
    assert found.samples == {"lora": [10.0, 1.0]}
