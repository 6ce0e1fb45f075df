"""The figures of a load run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from milora.benchmark.serve_client import Answer

PERCENTILES = (50, 90, 95, 99)


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """A run's throughput, latencies, and fairness between tenants.

    Times are in seconds. `first_token` is the time from a request's due time to its first piece of text,
    `between_tokens` the time between pieces, `per_token` a text's mean, (end - first) / (tokens - 1), and `request` the
    time from the due time to the end.

    Args:
        answers: The responses of one run.
    """
    good = [answer for answer in answers if not answer.error]
    seconds = max(answer.ended for answer in answers) - min(answer.due for answer in answers)
    tokens = sum(answer.tokens for answer in good)
    tenants = {
        model: _latencies([answer for answer in good if answer.model == model])
        for model in sorted({answer.model for answer in answers})
    }
    return {
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "errors": _errors(answers),
        "seconds": round(seconds, 3),
        "requests_per_second": round(len(good) / seconds, 3),
        "tokens": tokens,
        "prompt_tokens": sum(answer.prompt_tokens for answer in good),
        "tokens_per_second": round(tokens / seconds, 3),
        **_latencies(good),
        "tenants": tenants,
        "fairness": fairness(good),
    }


def fairness(answers: Sequence[Answer]) -> dict[str, float | None]:
    """Fairness between tenants.

    Returns:
        `jain`: Jain's index `(sum x)^2 / (n sum x^2)` of the tenants' mean speeds, tokens of a request over its
        seconds (Jain, Chiu and Hawe, 1984): 1 if all are equal, 1 / n if one tenant gets everything.
        `slowest_to_fastest_first_token`: the largest of the tenants' median times to the first token over the smallest.
    """
    by_tenant: dict[str, list[Answer]] = {}
    for answer in answers:
        by_tenant.setdefault(answer.model, []).append(answer)
    speeds = [fmean(each.tokens / (each.ended - each.due) for each in of_one) for of_one in by_tenant.values()]
    medians = [percentile([each.first_token for each in of_one], 50) for of_one in by_tenant.values()]
    if not speeds:
        return {"jain": None, "slowest_to_fastest_first_token": None}
    return {
        "jain": round(sum(speeds) ** 2 / (len(speeds) * sum(speed**2 for speed in speeds)), 4),
        "slowest_to_fastest_first_token": round(max(medians) / min(medians), 3) if min(medians) > 0 else None,
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """A percentile with linear interpolation, as in NumPy.

    Raises:
        ValueError: If there are no values.
    """
    if not values:
        raise ValueError("There are no values to take a percentile of.")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _latencies(answers: Sequence[Answer]) -> dict[str, dict[str, float] | None]:
    spans = [
        (answer.arrivals[-1] - answer.arrivals[0]) / (answer.tokens - 1) for answer in answers if answer.tokens > 1
    ]
    return {
        "first_token": _percentiles([answer.first_token for answer in answers]),
        "between_tokens": _percentiles([gap for answer in answers for gap in answer.gaps]),
        "per_token": _percentiles(spans),
        "request": _percentiles([answer.ended - answer.due for answer in answers]),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    named = {f"p{percent}": round(percentile(values, percent), 5) for percent in PERCENTILES}
    return {"mean": round(fmean(values), 5), **named, "max": round(max(values), 5)}


def _errors(answers: Sequence[Answer]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for answer in answers:
        if answer.error:
            counts[answer.error] = counts.get(answer.error, 0) + 1
    return counts
