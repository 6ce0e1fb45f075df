"""Tests whether two methods differ on the same test rows. Strings of 0 and 1 say which rows were right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest

SAMPLES = 5000


def mcnemar(a: str, b: str) -> float:
    """The two-sided p-value of McNemar's exact test: a binomial test on the rows that only one of the two got right."""
    only_a = sum(x > y for x, y in zip(a, b, strict=True))
    only_b = sum(x < y for x, y in zip(a, b, strict=True))
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def bootstrap(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], samples: int = SAMPLES
) -> tuple[float, float, float]:
    """The mean difference between two methods, and its 95 % interval from test rows drawn with replacement.

    Args:
        a: (seeds, rows): a measure of each row, such as whether its answer was right.
        b: The same for the other method, with the same rows and seeds.
        samples: Number of draws.
    """
    difference = np.mean(a, axis=0) - np.mean(b, axis=0)
    draws = np.random.default_rng(0).integers(len(difference), size=(samples, len(difference)))
    low, high = np.quantile(difference[draws].mean(axis=1), [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)
