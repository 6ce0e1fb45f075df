"""Pictures of routes. Needs matplotlib: `pip install "milora[plot]"`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from milora_core.errors import MiLoraError, importing
from milora_core.files import whole_file
from milora_core.routing import Route

COLORS = "Blues"
"""One hue from near-white (0 %) to dark (100 %): readable with colour blindness and in greyscale."""

MOST_BLOCKS_WITH_VALUES = 40
"""With more blocks than this, numbers in the cells would be too small to read."""


def route_heat_map(routes: Route | Mapping[str, Route], path: str | Path, title: str | None = None) -> None:
    """Draws the share of prompts that chose each expert by block, one panel per route.

    Args:
        routes: A route, or several by label, such as one for each task.
        path: Where to write; the suffix (`.png`, `.svg`, `.pdf`) sets the format. Written completely or not at all.
        title: Title above the panels; by default a description.

    Raises:
        MiLoraError: If matplotlib is missing or cannot write the format, there is no route, or routes are over
            different blocks or experts.
    """
    panels = {"": routes} if isinstance(routes, Route) else dict(routes)
    first = _alike(panels)
    figure = new_figure("constrained")
    blocks, experts = short_blocks(first.blocks), short_experts(first.experts)
    with_values = len(blocks) <= MOST_BLOCKS_WITH_VALUES
    # A cell holds "100%".
    width, height = 0.56 * len(experts) * len(panels) + 1.7, (0.3 if with_values else 0.12) * len(blocks) + 1.6
    text = title or _title(panels)
    figure.set_size_inches(max(width, 0.1 * len(text) + 0.5), height)
    figure.suptitle(text, fontsize=11, fontweight="bold")
    drawn = figure.subplots(1, len(panels), squeeze=False)[0]
    image: Any = None
    for axes, (label, route) in zip(drawn, panels.items(), strict=True):
        share = route.share().cpu()
        image = axes.imshow(share.numpy(), vmin=0, vmax=1, cmap=COLORS, aspect="auto")
        label_cells(axes, experts, blocks if axes is drawn[0] else None)
        if label:
            axes.set_title(f"{label} ({_count(route)})", fontsize=9)
        if with_values:
            one = len(route) == 1
            numbers = (route.probabilities[:, 0].cpu() if one else share).tolist()
            texts = [[f"{number:.2f}" if one else f"{number:.0%}" for number in of_block] for of_block in numbers]
            write_cells(axes, texts, share.tolist())
    bar = figure.colorbar(
        image, ax=list(drawn), ticks=[0, 0.25, 0.5, 0.75, 1], format="{x:g}", aspect=max(15, 2 * len(blocks))
    )
    bar.ax.tick_params(length=2, labelsize=8)
    bar.set_label("share of prompts", fontsize=8)
    save_figure(figure, Path(path))


def short_experts(experts: Sequence[str]) -> list[str]:
    """Each expert by the last part of its path, or by more parts where the last one is ambiguous."""
    return [_shortest(expert, experts) for expert in experts]


def short_blocks(blocks: Sequence[str]) -> list[str]:
    """Each block by its number."""
    numbers = [block.rpartition(".")[2] for block in blocks]
    return numbers if len(set(numbers)) == len(numbers) else list(blocks)


def _shortest(expert: str, experts: Sequence[str]) -> str:
    parts = expert.split(".")
    for count in range(1, len(parts)):
        ending = parts[-count:]
        if sum(other.split(".")[-count:] == ending for other in experts) == 1:
            return ".".join(ending)
    return expert


def _alike(panels: Mapping[str, Route]) -> Route:
    if not panels:
        raise MiLoraError("There is no route to draw.")
    (first_label, first), *others = panels.items()
    for label, route in others:
        if (route.blocks, route.experts) != (first.blocks, first.experts):
            raise MiLoraError(
                f"The routes {first_label!r} and {label!r} have different blocks or experts; draw them separately."
            )
    empty = next((label for label, route in panels.items() if len(route) == 0), None)
    if empty is not None:
        raise MiLoraError(f"The route {empty!r} is for no prompts; there is no share to draw.")
    return first


def _title(panels: Mapping[str, Route]) -> str:
    if list(panels) != [""]:
        return "Share of prompts that choose each expert"
    if len(panels[""]) == 1:
        return "Experts chosen for the prompt, with their probability"
    return f"Share of {_count(panels[''])} that choose each expert"


def _count(route: Route) -> str:
    return "1 prompt" if len(route) == 1 else f"{len(route)} prompts"


def new_figure(layout: Literal["constrained"] | None = None) -> Any:
    """A matplotlib figure with its own canvas.

    Args:
        layout: The layout engine; none by default.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    with importing("plot", "A picture"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    # Without pyplot, so the caller's backend and current figure do not change.
    figure = Figure(layout=layout)
    FigureCanvasAgg(figure)
    return figure


def label_cells(axes: Any, experts: Sequence[str], blocks: Sequence[str] | None) -> None:
    """Names the columns and, with `blocks`, the rows of a heat map of experts by block."""
    axes.set_xticks(range(len(experts)), experts, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for edge in range(1, len(experts)):
        axes.axvline(edge - 0.5, color="white", linewidth=1)
    if blocks is None:
        axes.set_yticks([])
        return
    step = 1 if len(blocks) <= MOST_BLOCKS_WITH_VALUES else 5
    axes.set_yticks(range(0, len(blocks), step), blocks[::step], fontsize=8)
    axes.set_ylabel("block", fontsize=9)


def write_cells(axes: Any, texts: Sequence[Sequence[str]], shares: Sequence[Sequence[float]]) -> None:
    """Writes a text in each cell of a heat map, readable on the colour of the cell's share."""
    for row, (of_block, shades) in enumerate(zip(texts, shares, strict=True)):
        for column, (text, shade) in enumerate(zip(of_block, shades, strict=True)):
            color = "white" if shade > 0.6 else "0.1" if shade > 0 else "0.6"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure in the format of the path's suffix, completely or not at all.

    Raises:
        MiLoraError: If matplotlib cannot write that format, or the file cannot be written.
    """
    kind = path.suffix.lower().lstrip(".")
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise MiLoraError(
            f"{path}: the suffix of a picture must be one of {', '.join(sorted(known))}; found {path.suffix!r}."
        )
    with whole_file(path) as partial:
        figure.savefig(partial, format=kind, dpi=160, facecolor="white")
