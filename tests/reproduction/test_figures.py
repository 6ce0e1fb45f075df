"""Figures, checked through their drawn elements: positions, medians, bands and shares computed by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.collections import FillBetweenPolyCollection, LineCollection
from support.grids import grid, record

from reproduction import figures
from reproduction.figures import line_figure, share_figure
from reproduction.grid import Grid
from reproduction.measurements import Results, results, shares

Accuracies = Mapping[tuple[str, str, float], Sequence[float]]
"""Accuracies of each seed by method, task and position on the axis."""


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collects figures instead of writing files."""
    found: list[Any] = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: found.append(figure))
    return found


def measured(of: Grid, setting: str, accuracies: Accuracies) -> Results:
    found = [(run, accuracies.get((run.method, run.tasks[0], run.settings[setting]))) for run in of.runs()]
    of.see([record(run, values[run.seed]) for run, values in found if values is not None])
    return results(of, of.sections[0])


def lines(axes: Any) -> dict[str, tuple[list[float], Any]]:
    """The x and y values of each method's line."""
    named = [line for line in axes.lines if line.get_label() in ("MiLoRA", "MOELoRA")]
    return {line.get_label(): (list(line.get_xdata()), pytest.approx(list(line.get_ydata()))) for line in named}


def bands(axes: Any) -> list[dict[float, tuple[float, float]]]:
    """For each band, its lower and upper edge at each x."""
    found = []
    for collection in axes.collections:
        assert isinstance(collection, FillBetweenPolyCollection)
        at: dict[float, list[float]] = {}
        for x, y in collection.get_paths()[0].vertices:
            at.setdefault(float(x), []).append(float(y))
        found.append({x: (pytest.approx(min(ys)), pytest.approx(max(ys))) for x, ys in sorted(at.items())})
    return found


def dotted(axes: Any) -> list[float]:
    return [float(line.get_xdata()[0]) for line in axes.lines if line.get_linestyle() == ":"]


def ticks(axes: Any) -> list[str]:
    return [label.get_text() for label in axes.get_xticklabels()]


def test_a_panel_a_task_and_a_line_with_its_band_a_method(drawn: list[Any], tmp_path: Path) -> None:
    limits = {"figure3": {"values": [1, 3, 7]}}
    of = grid(sections=["figure3"], tasks=("boolq", "piqa"), seeds=(0, 1, 2), limits=limits)
    accuracies: Accuracies = {
        ("milora", "boolq", 1): [0.1, 0.3, 0.2],
        ("milora", "boolq", 3): [0.9, 0.5, 0.6],
        ("milora", "boolq", 7): [0.7, 0.7, 0.8],
        ("moelora", "boolq", 1): [0.4, 0.4, 0.4],
        # No run with k = 3 has finished.
        ("moelora", "boolq", 7): [0.35, 0.25, 0.45],
        ("milora", "piqa", 3): [0.0, 1.0, 0.5],
    }
    line_figure(of.sections[0], measured(of, "top_k", accuracies), tmp_path / "3.png")
    boolq, piqa = drawn[0].axes
    assert (boolq.get_title(), piqa.get_title()) == ("boolq", "piqa")
    assert ticks(boolq) == ["1", "3", "7"]
    assert lines(boolq) == {"MiLoRA": ([0, 1, 2], [20, 60, 70]), "MOELoRA": ([0, 2], [40, 35])}
    assert bands(boolq) == [{0: (10, 30), 1: (50, 90), 2: (70, 80)}, {0: (40, 40), 2: (25, 45)}]
    assert lines(piqa) == {"MiLoRA": ([1], [50])}
    assert dotted(boolq) == dotted(piqa) == [1]
    low, high = boolq.get_ylim()
    assert low < 10
    assert high > 90


def test_one_seed_has_no_bands_and_another_axis_no_setting_of_the_paper(drawn: list[Any], tmp_path: Path) -> None:
    of = grid(sections=["figure4"], tasks=("boolq",), seeds=(0,), limits={"figure4": {"values": [0, 0.1, 1]}})
    accuracies: Accuracies = {("milora", "boolq", value): [value / 2] for value in (0, 1e-1, 1)}
    line_figure(of.sections[0], measured(of, "load_balancing_coef", accuracies), tmp_path / "4.png")
    (axes,) = drawn[0].axes
    assert ticks(axes) == ["0", "0.1", "1"]
    assert lines(axes) == {"MiLoRA": ([0, 1, 2], [0, 5, 50])}
    assert bands(axes) == dotted(axes) == []


def test_shares_of_all_choices_above_and_of_prompts_by_block_below(drawn: list[Any], tmp_path: Path) -> None:
    of = grid(sections=["figure2"], tasks=("boolq", "piqa"))
    share = {
        ("boolq", 0): [[1.0, 0.0], [0.5, 0.5]],
        ("boolq", 1): [[0.6, 0.4], [0.2, 0.8]],
        ("piqa", 0): [[0.0, 1.0], [0.0, 1.0]],
        ("piqa", 1): [[0.0, 1.0], [0.0, 1.0]],
    }
    found = []
    for run in of.runs():
        (task,) = run.tasks
        of_task = {"experts": ["self_attn.q_proj", "mlp.up_proj"], "blocks": [0, 3], "share": share[task, run.seed]}
        found.append(record(run, expert_shares={task: of_task}))
    of.see(found)
    share_figure(shares(results(of, of.sections[0])), "Shares", tmp_path / "2.png")
    bars, boolq, piqa, _ = drawn[0].axes
    # Of two blocks' choices, the first expert had 1.5 and 0.8 with the two seeds; the second had the rest.
    first, second = ([bar.get_height() for bar in one.patches] for one in bars.containers if hasattr(one, "patches"))
    assert first == pytest.approx([(0.75 + 0.4) / 2, (0.25 + 0.6) / 2])
    assert second == pytest.approx([0, 1])
    errors = [segment for one in bars.collections if isinstance(one, LineCollection) for segment in one.get_segments()]
    assert (errors[0][0][1], errors[0][1][1]) == pytest.approx((0.4, 0.75))
    assert ticks(bars) == ["q_proj", "up_proj"]
    assert boolq.images[0].get_array().tolist() == [pytest.approx([0.8, 0.2]), pytest.approx([0.35, 0.65])]
    assert piqa.images[0].get_array().tolist() == [[0, 1], [0, 1]]
    assert {text.get_text() for text in boolq.texts} == {"80%", "20%", "35%", "65%"}
