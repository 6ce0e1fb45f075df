"""Figures by what is drawn in them: places, medians, bands and shares worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.collections import FillBetweenPolyCollection, LineCollection
from support.grids import grid, record

from milora.paper import figures
from milora.paper.figures import line_figure, share_figure, shares
from milora.paper.grid import Grid
from milora.paper.statistics import Measurements
from milora.paper.store import Results

BOTH = ["milora", "moelora"]
Accuracies = Mapping[tuple[str, str, float], Sequence[float]]
"""By method, task and place on the axis, for each seed."""


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures instead of files."""
    found: list[Any] = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: found.append(figure))
    return found


def measured(of: Grid, setting: str, accuracies: Accuracies) -> Measurements:
    finished = {}
    for run in of.runs(Results(), lambda digest: True):
        values = accuracies.get((run.method, run.tasks[0], run.settings[setting]))
        if values is not None:
            finished[run.digest] = record(run, values[run.seed])
    return Measurements(of, Results(finished))


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """The named lines: x and y."""
    named = [line for line in axes.lines if not line.get_label().startswith("_")]
    return {line.get_label(): (list(line.get_xdata()), pytest.approx(list(line.get_ydata()))) for line in named}


def bands(axes: Any) -> list[dict[float, tuple[float, float]]]:
    """Each band: from x to its lower and upper edge there."""
    found = []
    for collection in axes.collections:
        assert isinstance(collection, FillBetweenPolyCollection)
        at: dict[float, list[float]] = {}
        for x, y in collection.get_paths()[0].vertices:
            at.setdefault(float(x), []).append(float(y))
        found.append({x: (pytest.approx(min(ys)), pytest.approx(max(ys))) for x, ys in sorted(at.items())})
    return found


def dotted(axes: Any) -> list[float]:
    """Where dotted lines stand."""
    return [float(line.get_xdata()[0]) for line in axes.lines if line.get_linestyle() == ":"]


def ticks(axes: Any) -> list[str]:
    return [label.get_text() for label in axes.get_xticklabels()]


def caption(figure: Any) -> str:
    return str(figure.texts[-1].get_text())


def test_figure_3_has_a_panel_a_task_and_a_line_with_its_band_a_method(drawn: list[Any], tmp_path: Path) -> None:
    limits = {"figure3": {"values": [1, 3, 7]}}
    of = grid(sections=["figure3"], only_methods=BOTH, tasks=("boolq", "piqa"), seeds=(0, 1, 2), limits=limits)
    accuracies: Accuracies = {
        ("milora", "boolq", 1): [0.1, 0.3, 0.2],
        ("milora", "boolq", 3): [0.9, 0.5, 0.6],
        ("milora", "boolq", 7): [0.7, 0.7, 0.8],
        ("moelora", "boolq", 1): [0.4, 0.4, 0.4],
        # Of k = 3 nothing has finished.
        ("moelora", "boolq", 7): [0.35, 0.25, 0.45],
        ("milora", "piqa", 3): [0.0, 1.0, 0.5],
    }
    assert line_figure(of.sections[0], measured(of, "top_k", accuracies), tmp_path / "3.png")
    (figure,) = drawn
    boolq, piqa = figure.axes
    assert (boolq.get_title(loc="left"), piqa.get_title(loc="left")) == ("boolq", "piqa")
    assert ticks(boolq) == ["1", "3", "7"]
    assert lines(boolq) == {"MiLoRA": ([0, 1, 2], [20, 60, 70]), "MOELoRA": ([0, 2], [40, 35])}
    assert bands(boolq) == [{0: (10, 30), 1: (50, 90), 2: (70, 80)}, {0: (40, 40), 2: (25, 45)}]
    assert lines(piqa) == {"MiLoRA": ([1], [50])}
    assert dotted(boolq) == dotted(piqa) == [1]
    assert caption(figure).endswith("Dotted: the paper's setting for MiLoRA, 3.")
    low, high = boolq.get_ylim()
    assert low < 10
    assert high > 90
    assert boolq.get_xlabel() == "k, experts chosen"


def test_figure_4_with_one_seed_has_no_bands(drawn: list[Any], tmp_path: Path) -> None:
    of = grid(sections=["figure4"], tasks=("boolq",), seeds=(0,))
    accuracies: Accuracies = {("milora", "boolq", value): [value / 2] for value in (0, 1e-3, 1e-2, 1e-1, 1)}
    assert line_figure(of.sections[0], measured(of, "load_balancing_coef", accuracies), tmp_path / "4.png")
    (axes,) = drawn[0].axes
    assert ticks(axes) == ["0", "0.001", "0.01", "0.1", "1"]
    assert lines(axes) == {"MiLoRA": ([0, 1, 2, 3, 4], [0, 0.05, 0.5, 5, 50])}
    assert bands(axes) == []
    assert dotted(axes) == [2]
    assert caption(drawn[0]).endswith("MiLoRA, 0.01.")


def test_figure_5(drawn: list[Any], tmp_path: Path) -> None:
    of = grid(sections=["figure5"], tasks=("piqa",), seeds=(0, 1))
    ranks = (8, 16, 32, 64, 128, 256)
    accuracies: Accuracies = {
        **{("milora", "piqa", rank): [0.5 + rank / 1000, 0.6 + rank / 1000] for rank in ranks},
        **{("moelora", "piqa", rank): [0.2, 0.2] for rank in ranks},
    }
    assert line_figure(of.sections[0], measured(of, "r", accuracies), tmp_path / "5.png")
    (axes,) = drawn[0].axes
    assert ticks(axes) == ["8", "16", "32", "64", "128", "256"]
    assert lines(axes) == {
        "MiLoRA": ([0, 1, 2, 3, 4, 5], [55.8, 56.6, 58.2, 61.4, 67.8, 80.6]),
        "MOELoRA": ([0, 1, 2, 3, 4, 5], [20] * 6),
    }
    first, second = bands(axes)
    assert (first[0], first[5]) == ((50.8, 60.8), (75.6, 85.6))
    assert all(band == (20, 20) for band in second.values())
    assert len(second) == 6
    assert dotted(axes) == [2]
    assert axes.get_xlabel() == "r, rank"


def test_the_paper_s_setting_is_said_only_where_it_is_drawn(drawn: list[Any], tmp_path: Path) -> None:
    of = grid(sections=["figure5"], tasks=("piqa",), seeds=(0,), limits={"figure5": {"values": [8, 16]}})
    accuracies: Accuracies = {("milora", "piqa", 8): [0.5], ("milora", "piqa", 16): [0.5]}
    assert line_figure(of.sections[0], measured(of, "r", accuracies), tmp_path / "5.png")
    assert dotted(drawn[0].axes[0]) == []
    assert caption(drawn[0]) == "Lines: median over seeds. Bands: least to greatest."


def test_nothing_is_drawn_of_nothing(drawn: list[Any], tmp_path: Path) -> None:
    of = grid(sections=["figure5"], tasks=("piqa",), seeds=(0,))
    assert not line_figure(of.sections[0], Measurements(of, Results()), tmp_path / "5.png")
    assert drawn == []


def test_figure_2_has_shares_of_all_choices_above_and_of_prompts_by_block_below(
    drawn: list[Any], tmp_path: Path
) -> None:
    of = grid(sections=["figure2"], tasks=("boolq", "piqa"), seeds=(0, 1))
    experts, blocks = ["self_attn.q_proj", "mlp.up_proj"], [0, 3]
    share = {
        ("boolq", 0): [[1.0, 0.0], [0.5, 0.5]],
        ("boolq", 1): [[0.6, 0.4], [0.2, 0.8]],
        ("piqa", 0): [[0.0, 1.0], [0.0, 1.0]],
        ("piqa", 1): [[0.0, 1.0], [0.0, 1.0]],
    }
    finished = {}
    for run in of.runs(Results(), lambda digest: True):
        (task,) = run.tasks
        of_task = {"experts": experts, "blocks": blocks, "share": share[task, run.seed], "prompts": 5}
        finished[run.digest] = record(run, expert_shares={task: of_task})
    found = shares(of.sections[0], Measurements(of, Results(finished)))
    assert share_figure(found, "Shares", tmp_path / "2.png")
    bars, boolq, piqa, _ = drawn[0].axes
    # Of two blocks' choices the first expert had 1.5 and 0.8 of 2 with the two seeds, the second the rest.
    first, second = ([bar.get_height() for bar in container.patches] for container in _bars(bars))
    assert first == pytest.approx([(0.75 + 0.4) / 2, (0.25 + 0.6) / 2])
    assert second == pytest.approx([0, 1])
    errors = [
        segment for lines in bars.collections if isinstance(lines, LineCollection) for segment in lines.get_segments()
    ]
    assert [(segment[0][1], segment[1][1]) for segment in errors[:2]] == [
        pytest.approx((0.4, 0.75)),
        pytest.approx((0.25, 0.6)),
    ]
    assert [label.get_text() for label in bars.get_xticklabels()] == ["q_proj", "up_proj"]
    assert boolq.images[0].get_array().tolist() == [pytest.approx([0.8, 0.2]), pytest.approx([0.35, 0.65])]
    assert piqa.images[0].get_array().tolist() == [[0, 1], [0, 1]]
    assert [label.get_text() for label in boolq.get_yticklabels()] == ["0", "3"]
    assert {text.get_text() for text in boolq.texts} == {"80%", "20%", "35%", "65%"}


def _bars(axes: Any) -> list[Any]:
    return [container for container in axes.containers if hasattr(container, "patches")]
