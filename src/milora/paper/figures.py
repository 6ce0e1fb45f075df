"""The paper's figures as pictures: what the routers choose, and lines with their spread."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from milora.paper.sections import Section
from milora.paper.statistics import Measurements, Summary
from milora.plots import COLORS, label_cells, new_figure, save_figure, short_experts

SERIES: Mapping[str, tuple[str, str]] = {"MiLoRA": ("#08519c", "o"), "MOELoRA": ("#d95f0e", "s")}
"""Colour and marker of each line: told apart by the colour-blind and in grey print."""

OTHER_SERIES = ("0.35", "^")
TASK_COLORS = ("#08519c", "#6baed6", "#d95f0e", "#fdae6b", "0.35", "0.7", "#756bb1")
LEAST_RANGE = 10.0
"""Percentage points that an axis shows at least, so that noise does not look like a trend."""

PAPER_LIMIT = 0.3
AXES: Mapping[str, tuple[str, str, float]] = {
    "figure3": ("k, experts chosen", "{:.0f}", 3),
    "figure4": ("λ, coefficient of the load-balancing loss", "{:g}", 1e-2),
    "figure5": ("r, rank", "{:.0f}", 32),
}
"""Of each figure of lines: what its axis is, how its values are written, and the paper's setting."""


def line_figure(section: Section, measured: Measurements, path: Path) -> bool:
    """Draws accuracy against a setting: a panel for each task, a line for each method, its spread as a band.

    Args:
        section: Figure 3, 4 or 5.
        measured: The results.
        path: Where to write.

    Returns:
        Whether there was anything to draw.

    Raises:
        MiLoraError: If matplotlib is missing or cannot write the format.
    """
    lines = {
        column: {name: points for name in _series(section) if (points := _points(section, measured, column, name))}
        for column in section.columns
    }
    panels = {column: of_column for column, of_column in lines.items() if of_column}
    if not panels:
        return False
    values = sorted({row.x for row in section.rows if row.x is not None})
    axis, form, setting = AXES[section.name]
    figure = new_figure()
    # Not narrower than its title and the line below it.
    figure.set_size_inches(max(0.5 + 3.3 * len(panels), 5.6), 3.7)
    figure.suptitle(section.title, x=0.02, y=0.97, ha="left", va="top", fontsize=11, fontweight="bold")
    for index, (column, of_column) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), index + 1)
        for name, points in of_column.items():
            _draw_line(axes, name, values, points)
        axes.set_title(column, fontsize=9, loc="left")
        axes.set_xticks(range(len(values)), [form.format(value) for value in values], fontsize=8)
        axes.set_xlim(-0.4, len(values) - 0.6)
        axes.set_xlabel(axis, fontsize=8)
        axes.set_ylim(*_range([summary for points in of_column.values() for summary in points.values()]))
        if index == 0:
            axes.set_ylabel("accuracy, %", fontsize=9)
        if setting in values:
            axes.axvline(values.index(setting), color="0.6", linewidth=0.8, linestyle=":", zorder=0)
        _tidy(axes)
    handles, names = figure.axes[0].get_legend_handles_labels()
    # Under the title, where no title is too long for it.
    figure.legend(handles, names, loc="upper right", bbox_to_anchor=(0.99, 0.92), ncols=4, frameon=False, fontsize=8)
    legend = "Lines: median over seeds. Bands: least to greatest."
    if setting in values:
        legend += f" Dotted: the paper's setting for MiLoRA, {form.format(setting)}."
    figure.text(0.02, 0.015, legend, fontsize=7, color="0.35")
    figure.subplots_adjust(
        left=0.6 / figure.get_figwidth(), right=0.985, top=0.8, bottom=0.23, wspace=0.18 + 0.05 * len(panels)
    )
    save_figure(figure, path)
    return True


@dataclass(frozen=True)
class Shares:
    """What the routers chose for the prompts of a task, in the mean over seeds.

    Attributes:
        experts: Their paths in a block.
        blocks: Their numbers.
        by_block: (blocks, experts): the share of prompts that chose the expert in the block.
        overall: By expert, the share of all choices in all blocks, in the mean over seeds, the least and the greatest.
        seeds: How many.
    """

    experts: tuple[str, ...]
    blocks: tuple[int, ...]
    by_block: tuple[tuple[float, ...], ...]
    overall: tuple[tuple[float, float, float], ...]
    seeds: int


def shares(section: Section, measured: Measurements) -> dict[str, Shares]:
    """Figure 2's numbers by task, of the tasks that have been measured."""
    found = {}
    for column in section.columns:
        of_task = [record["expert_shares"].get(column) for record in measured.records(section.rows[0], column)]
        known = [one for one in of_task if one]
        if known:
            found[column] = _mean_shares(known)
    return found


def share_figure(by_task: Mapping[str, Shares], title: str, path: Path) -> bool:
    """Draws figure 2: above, each expert's share of all choices, by task; below, where in the blocks they fell.

    Args:
        by_task: What [`shares`] returns.
        title: Above it.
        path: Where to write.

    Returns:
        Whether there was anything to draw.

    Raises:
        MiLoraError: If matplotlib is missing or cannot write the format.
    """
    if not by_task:
        return False
    first = next(iter(by_task.values()))
    experts = short_experts(first.experts)
    figure = new_figure()
    # In inches, as the heat maps' cells hold "100%".
    panel = 0.52 * len(experts), min(max(0.3 * len(first.blocks), 1.0), 5.0)
    width = max(0.75 + (panel[0] + 0.35) * len(by_task) + 0.6, 8.0)
    height = 0.75 + 2.1 + 0.95 + panel[1] + 0.65
    figure.set_size_inches(width, height)
    figure.suptitle(title, x=0.75 / width, y=1 - 0.12 / height, ha="left", va="top", fontsize=11, fontweight="bold")
    bars = figure.add_axes((0.75 / width, (0.75 + panel[1] + 0.95) / height, (width - 1.9) / width, 2.1 / height))
    _draw_bars(bars, by_task, experts)
    image: Any = None
    for position, (task, of_task) in enumerate(by_task.items()):
        axes = figure.add_axes(
            ((0.75 + position * (panel[0] + 0.35)) / width, 0.75 / height, panel[0] / width, panel[1] / height)
        )
        image = axes.imshow(of_task.by_block, vmin=0, vmax=1, cmap=COLORS, aspect="auto")
        label_cells(axes, experts, [str(block) for block in of_task.blocks] if position == 0 else None)
        axes.set_title(f"{task}: share of prompts", fontsize=8, loc="left", pad=4)
        if len(of_task.blocks) <= 16:
            _write_shares(axes, of_task.by_block)
    bar = figure.add_axes(
        ((0.75 + len(by_task) * (panel[0] + 0.35) - 0.2) / width, 0.75 / height, 0.12 / width, panel[1] / height)
    )
    figure.colorbar(image, cax=bar, ticks=[0, 0.5, 1])
    bar.set_yticklabels(["0", "50%", "100%"], fontsize=7)
    bar.tick_params(length=2)
    save_figure(figure, path)
    return True


def shares_csv(by_task: Mapping[str, Shares]) -> str:
    """Figure 2's numbers, by task, block and expert; the lines of block `all` are shares of all choices."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["task", "block", "expert", "share", "min", "max", "seeds"])
    for task, of_task in by_task.items():
        for expert, (share, low, high) in zip(of_task.experts, of_task.overall, strict=True):
            writer.writerow([task, "all", expert, f"{share:.4f}", f"{low:.4f}", f"{high:.4f}", of_task.seeds])
        for block, row in zip(of_task.blocks, of_task.by_block, strict=True):
            for expert, share in zip(of_task.experts, row, strict=True):
                writer.writerow([task, block, expert, f"{share:.4f}", "", "", of_task.seeds])
    return text.getvalue()


def _mean_shares(records: Sequence[Mapping[str, Any]]) -> Shares:
    experts, blocks = tuple(records[0]["experts"]), tuple(records[0]["blocks"])
    by_block = tuple(
        tuple(mean(record["share"][row][column] for record in records) for column in range(len(experts)))
        for row in range(len(blocks))
    )
    totals = []
    for record in records:
        sums = [sum(row[column] for row in record["share"]) for column in range(len(experts))]
        totals.append([value / (sum(sums) or 1.0) for value in sums])
    overall = tuple((mean(values), min(values), max(values)) for values in zip(*totals, strict=True))
    return Shares(experts, blocks, by_block, overall, len(records))


def _draw_bars(axes: Any, by_task: Mapping[str, Shares], experts: Sequence[str]) -> None:
    breadth = 0.8 / len(by_task)
    highest = PAPER_LIMIT
    for position, (task, of_task) in enumerate(by_task.items()):
        places = [index - 0.4 + breadth * (position + 0.5) for index in range(len(experts))]
        heights = [share for share, _, _ in of_task.overall]
        spread = [
            [share - low for share, low, _ in of_task.overall],
            [high - share for share, _, high in of_task.overall],
        ]
        color = TASK_COLORS[position % len(TASK_COLORS)]
        axes.bar(places, heights, breadth * 0.92, color=color, label=task)
        if of_task.seeds > 1:
            axes.errorbar(places, heights, yerr=spread, fmt="none", ecolor="0.15", elinewidth=0.8, capsize=2)
        highest = max(highest, *(high for _, _, high in of_task.overall))
    axes.axhline(PAPER_LIMIT, color="0.4", linewidth=0.8, linestyle=":")
    beside = len(experts) - 0.4
    axes.text(beside, PAPER_LIMIT, "30%: in the paper\nno expert is above", fontsize=7, color="0.35", va="center")
    even = 1 / len(experts)
    axes.axhline(even, color="0.4", linewidth=0.8, linestyle="--")
    axes.text(beside, even, "all alike", fontsize=7, color="0.35", va="center")
    axes.set_xlim(-0.5, len(experts) - 0.45)
    axes.set_ylim(0, highest * 1.12)
    axes.set_xticks(range(len(experts)), experts, fontsize=8)
    axes.set_yticks([0, 0.1, 0.2, 0.3], ["0", "10%", "20%", "30%"], fontsize=8)
    axes.set_ylabel("share of all choices", fontsize=8)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(by_task), frameon=False, fontsize=8, borderpad=0)
    _tidy(axes)


def _write_shares(axes: Any, by_block: Sequence[Sequence[float]]) -> None:
    for row, of_block in enumerate(by_block):
        for column, share in enumerate(of_block):
            color = "white" if share > 0.6 else "0.1" if share > 0 else "0.6"
            axes.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=7, color=color)


def _series(section: Section) -> list[str]:
    return list(dict.fromkeys(row.series for row in section.rows))


def _points(section: Section, measured: Measurements, column: str, series: str) -> dict[float, Summary]:
    found = {row.x: measured.accuracy(row, column) for row in section.rows if row.series == series}
    return {x: summary for x, summary in found.items() if x is not None and summary is not None}


def _draw_line(axes: Any, name: str, values: Sequence[float], points: Mapping[float, Summary]) -> None:
    color, marker = SERIES.get(name, OTHER_SERIES)
    # Evenly spaced whatever the values: they are powers, or 0 and powers.
    places = [values.index(x) for x in sorted(points)]
    ordered = [points[x] for x in sorted(points)]
    if any(len(summary.values) > 1 for summary in ordered):
        lows, highs = [summary.low for summary in ordered], [summary.high for summary in ordered]
        axes.fill_between(places, lows, highs, color=color, alpha=0.16, linewidth=0)
    axes.plot(places, [s.median for s in ordered], color=color, marker=marker, markersize=4, linewidth=1.6, label=name)


def _range(summaries: Sequence[Summary]) -> tuple[float, float]:
    low, high = min(s.low for s in summaries), max(s.high for s in summaries)
    pad = max((LEAST_RANGE - (high - low)) / 2, 0.08 * (high - low), 1.0)
    low, high = low - pad, high + pad
    # Moved rather than cut, so that what is at 0 or 100 % keeps its range; a little more, so that markers are whole.
    if high > 101.5:
        low, high = low - (high - 101.5), 101.5
    if low < -1.5:
        low, high = -1.5, min(high + (-1.5 - low), 101.5)
    return low, high


def _tidy(axes: Any) -> None:
    axes.tick_params(length=2, labelsize=8)
    axes.grid(axis="y", color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("0.6")
