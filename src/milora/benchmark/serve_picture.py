"""Plots the latency distributions of a load run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from milora.plots import new_figure, save_figure

MOST_TENANTS = 8
"""Maximum number of lines for tenants of one endpoint. With more tenants, one line is drawn for all."""


def draw_load(result: Mapping[str, Any], path: Path) -> None:
    """Draws the distributions of the time to the first token and of the time between tokens.

    Each line is an endpoint, or a tenant if there is only one endpoint with few tenants.

    Args:
        result: The result of [`milora.benchmark.serve.serve_load`].
        path: The file to write. Its suffix determines the format.

    Raises:
        MiLoraError: If matplotlib is missing or cannot write the format.
    """
    answers = [answer for answer in result["answers"] if not answer["error"]]
    endpoints = list(dict.fromkeys(answer["endpoint"] for answer in answers))
    tenants = sorted({answer["model"] for answer in answers})
    by_tenant = len(endpoints) == 1 and 1 < len(tenants) <= MOST_TENANTS
    labels = tenants if by_tenant else endpoints
    figure = new_figure("constrained")
    figure.set_size_inches(9, 3.6)
    left, right = figure.subplots(1, 2)
    for label in labels:
        own = [answer for answer in answers if answer["model" if by_tenant else "endpoint"] == label]
        _line(left, [answer["arrivals"][0] - answer["due"] for answer in own], label)
        gaps = [b - a for answer in own for a, b in zip(answer["arrivals"], answer["arrivals"][1:], strict=False)]
        _line(right, gaps, label)
    for axes, what in ((left, "time to first token"), (right, "time between tokens")):
        axes.set_xlabel(f"{what} (milliseconds)", fontsize=9)
        axes.set_ylim(0, 1)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
    left.set_ylabel("share of them that were as fast", fontsize=9)
    left.legend(fontsize=8, loc="lower right")
    settings = result["settings"]
    rate = f"{settings['rate']:g} requests/s" if settings["rate"] else "all at once"
    figure.suptitle(f"{len(answers)} requests, {rate}, {len(tenants)} models", fontsize=11, fontweight="bold")
    save_figure(figure, path)


def _line(axes: Any, seconds: Sequence[float], label: str) -> None:
    ordered = sorted(seconds)
    if ordered:
        shares = [(place + 1) / len(ordered) for place in range(len(ordered))]
        axes.step([1000 * each for each in ordered], shares, where="post", label=label, linewidth=1.5)
