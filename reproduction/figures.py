"""The paper's figures: accuracy along an axis, and the experts' shares of the routers' choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from milora.methods import method
from milora.plots import COLORS, label_cells, new_figure, save_figure, short_experts, write_cells
from reproduction.experiments import Section
from reproduction.measurements import Results, Shares, Summary, summary

SERIES = (("#08519c", "o"), ("#d95f0e", "s"), ("0.35", "^"), ("#756bb1", "D"))
"""Colour and marker of each line. They are distinct for colour-blind readers and in grey print."""

TASK_COLORS = ("#08519c", "#6baed6", "#d95f0e", "#fdae6b", "0.35", "0.7", "#756bb1")
LEAST_RANGE = 10.0
"""Minimum range of an axis in percentage points, so noise does not look like a trend."""

PAPER_LIMIT = 0.3
"""No expert has a larger share in the paper's figure 2."""

MOST_BLOCKS_WITH_VALUES = 16


def line_figure(section: Section, found: Results, path: Path) -> None:
    """Draws accuracy against a setting: a panel for each task, a line for each method, the seeds' spread as a band."""
    marked = section.comparison.marked
    values = sorted({row.x for row in section.rows if row.x is not None})
    figure = new_figure(layout="constrained")
    figure.set_size_inches(max(3.4 * len(section.columns), 5.6), 3.6)
    figure.suptitle(section.title, fontsize=11, fontweight="bold")
    panels = figure.subplots(1, len(section.columns), squeeze=False)[0]
    for axes, column in zip(panels, section.columns, strict=True):
        drawn: list[Summary] = []
        for style, name in zip(SERIES, dict.fromkeys(row.method for row in section.rows), strict=False):
            summaries = {row.x: summary(found, row.label, column) for row in section.rows if row.method == name}
            points = {x: one for x, one in summaries.items() if x is not None and one is not None}
            if points:
                _draw_line(axes, name, style, values, points)
                drawn += points.values()
        axes.set_title(column, fontsize=9)
        axes.set_xticks(range(len(values)), [f"{value:g}" for value in values], fontsize=8)
        axes.set_xlim(-0.4, len(values) - 0.6)
        axes.set_xlabel(section.comparison.axis, fontsize=8)
        if drawn:
            axes.set_ylim(*_range(drawn))
        if marked in values:
            label = f"the paper's setting for MiLoRA, {marked:g}"
            axes.axvline(values.index(marked), color="0.6", linewidth=0.8, linestyle=":", zorder=0, label=label)
        _tidy(axes)
    panels[0].set_ylabel("accuracy, %: median,\nleast to greatest seed", fontsize=8)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    save_figure(figure, path)


def share_figure(by_task: Mapping[str, Shares], title: str, path: Path) -> None:
    """Draws figure 2: above, each expert's share of all choices, by task; below, the share of prompts by block."""
    first = next(iter(by_task.values()))
    experts = short_experts(first.experts)
    figure = new_figure(layout="constrained")
    # Cells of the heat maps must fit "100%".
    heat_height = min(max(0.3 * len(first.blocks), 1.2), 5.0)
    figure.set_size_inches(max(0.55 * len(experts) * len(by_task) + 1.5, 8.0), 3.6 + heat_height)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    above, below = figure.subfigures(2, 1, height_ratios=[2.6, heat_height + 1.0])
    _draw_bars(above.subplots(), by_task, experts)
    panels = below.subplots(1, len(by_task), squeeze=False)[0]
    image: Any = None
    for axes, (task, of_task) in zip(panels, by_task.items(), strict=True):
        image = axes.imshow(of_task.by_block, vmin=0, vmax=1, cmap=COLORS, aspect="auto")
        label_cells(axes, experts, [str(block) for block in of_task.blocks] if axes is panels[0] else None)
        axes.set_title(f"{task}: share of prompts", fontsize=8)
        if len(of_task.blocks) <= MOST_BLOCKS_WITH_VALUES:
            write_cells(axes, [[f"{share:.0%}" for share in row] for row in of_task.by_block], of_task.by_block)
    bar = below.colorbar(image, ax=list(panels), ticks=[0, 0.5, 1], format="{x:.0%}", aspect=12)
    bar.ax.tick_params(length=2, labelsize=7)
    save_figure(figure, path)


def _draw_bars(axes: Any, by_task: Mapping[str, Shares], experts: Sequence[str]) -> None:
    breadth = 0.8 / len(by_task)
    highest = PAPER_LIMIT
    for position, (task, of_task) in enumerate(by_task.items()):
        places = np.arange(len(experts)) - 0.4 + breadth * (position + 0.5)
        heights, lows, highs = np.array(of_task.overall).T
        axes.bar(places, heights, breadth * 0.92, color=TASK_COLORS[position % len(TASK_COLORS)], label=task)
        if of_task.seeds > 1:
            spread = [heights - lows, highs - heights]
            axes.errorbar(places, heights, yerr=spread, fmt="none", ecolor="0.15", elinewidth=0.8, capsize=2)
        highest = max(highest, *highs)
    axes.axhline(PAPER_LIMIT, color="0.4", linewidth=0.8, linestyle=":", label="30 %, the paper's highest")
    axes.axhline(1 / len(experts), color="0.4", linewidth=0.8, linestyle="--", label="all alike")
    axes.set_ylim(0, highest * 1.12)
    axes.set_xticks(range(len(experts)), experts, fontsize=8)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_ylabel("share of all choices", fontsize=8)
    axes.figure.legend(loc="outside upper center", ncols=len(by_task) + 2, frameon=False, fontsize=8)
    _tidy(axes)


def _draw_line(
    axes: Any, name: str, style: tuple[str, str], values: Sequence[float], points: Mapping[float, Summary]
) -> None:
    color, marker = style
    # Always evenly spaced, because the values are powers, or 0 and powers.
    places = [values.index(x) for x in sorted(points)]
    ordered = [points[x] for x in sorted(points)]
    if any(len(summary.values) > 1 for summary in ordered):
        lows, highs = [min(one.values) for one in ordered], [max(one.values) for one in ordered]
        axes.fill_between(places, lows, highs, color=color, alpha=0.16, linewidth=0)
    medians = [one.median for one in ordered]
    axes.plot(places, medians, color=color, marker=marker, markersize=4, linewidth=1.6, label=method(name).title)


def _range(summaries: Sequence[Summary]) -> tuple[float, float]:
    low, high = min(min(s.values) for s in summaries), max(max(s.values) for s in summaries)
    pad = max((LEAST_RANGE - (high - low)) / 2, 0.08 * (high - low), 1.0)
    # A little beyond 0 and 100 %, so markers are whole. Moved rather than cut, so the range stays.
    high = min(high + pad, 101.5)
    low = max(min(low - pad, high - LEAST_RANGE), -1.5)
    return low, max(high, low + LEAST_RANGE)


def _tidy(axes: Any) -> None:
    axes.tick_params(length=2, labelsize=8)
    axes.grid(axis="y", color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("0.6")
