"""Draws the pictures of docs/concepts: python scripts/site/drawings.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

IMAGES = Path(__file__).parents[2] / "docs" / "images"
GREY, BLUE, ORANGE, INK = "#e8e8ee", "#9fc5f2", "#f7c98b", "#222233"


def box(axes: Any, x: float, y: float, width: float, height: float, text: str, colour: str, size: float = 9) -> None:
    """A rounded box with a centred text."""
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", facecolor=colour, edgecolor=INK, linewidth=0.8
    )
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=INK)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], **style: Any) -> None:
    """An arrow from start to end."""
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=10, color=INK, linewidth=0.9, shrinkA=0, shrinkB=0, **style
        )
    )


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """A figure whose coordinates are inches."""
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    return figure, axes


def routing() -> Any:
    """One block: the router reads the prompt once, and three of seven modules are adapted from then on."""
    figure, axes = canvas(9.2, 4.1)
    axes.text(0.2, 3.85, "Prefill: the router runs once", fontsize=11, weight="bold", color=INK)
    axes.text(5.0, 3.85, "Decoding: no router runs", fontsize=11, weight="bold", color=INK)
    chosen = {"q_proj", "v_proj", "up_proj"}
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for left, tokens in ((0.2, ["the", "sky", "is"]), (5.0, ["blue"])):
        for place, token in enumerate(tokens):
            box(axes, left + place * 0.62, 0.15, 0.56, 0.32, token, GREY, 8.5)
        axes.add_patch(
            FancyBboxPatch(
                (left, 0.85),
                4.0,
                1.15,
                boxstyle="round,pad=0,rounding_size=0.1",
                facecolor="none",
                edgecolor="#8888a0",
                linewidth=1,
                linestyle="--",
            )
        )
        axes.text(left + 3.95, 2.06, "block", ha="right", va="bottom", fontsize=8.5, color="#666680")
        for place, module in enumerate(modules):
            x = left + 0.08 + place * 0.555
            active = module in chosen
            box(axes, x, 1.0, 0.51, 0.36, module.replace("_proj", ""), GREY, 8.5)
            box(axes, x, 1.5, 0.51, 0.36, "LoRA", ORANGE if active else "white", 8)
            if not active:
                axes.plot([x + 0.06, x + 0.45], [1.55, 1.81], color="#aa3333", linewidth=1)
        arrow(axes, (left + 0.28, 0.5), (left + 0.28, 0.83))
    box(axes, 0.6, 2.55, 3.2, 0.42, "router: norm, pool, activation, softmax, top 3", BLUE, 8.5)
    arrow(axes, (0.28, 0.83), (0.58, 2.76), connectionstyle="arc3,rad=-0.3")
    arrow(axes, (2.2, 2.52), (2.2, 2.02))
    box(axes, 1.45, 3.2, 1.5, 0.36, "route: q, v, up", ORANGE, 8.5)
    arrow(axes, (2.2, 2.98), (2.2, 3.18))
    box(axes, 6.25, 3.2, 1.5, 0.36, "route: q, v, up", ORANGE, 8.5)
    arrow(axes, (2.98, 3.38), (6.22, 3.38))
    axes.text(4.6, 3.46, "reused for every token", ha="center", va="bottom", fontsize=8.5, color=INK)
    arrow(axes, (7.0, 3.18), (7.0, 2.02))
    return figure


def cache() -> Any:
    """Which tokens are adapted, and which keys and values every tenant can share."""
    figure, axes = canvas(9.2, 4.0)
    prompt, new = 6, 3
    rows = [
        (
            'adapted_tokens="all"',
            "the router reads the whole prompt",
            [BLUE] * 6,
            [ORANGE] * 6,
            "cache: this adapter, this route only",
        ),
        (
            'adapted_tokens="all", router_window=3',
            "the router reads the first 3 tokens",
            [BLUE] * 3 + [None] * 3,
            [ORANGE] * 6,
            "cache: this adapter, prompts with the same first 3 tokens",
        ),
        (
            'adapted_tokens="completion", pooler="last"',
            "the router reads the last prompt token",
            [None] * 5 + [BLUE],
            [GREY] * 5 + [ORANGE],
            "cache of tokens 1 to 5: every adapter and the bare backbone",
        ),
    ]
    for place, (setting, reads, read, colours, shared) in enumerate(rows):
        y = 2.85 - place * 1.12
        axes.text(0.2, y + 0.47, setting, fontsize=8.5, family="monospace", color=INK, va="center")
        axes.text(0.2, y + 0.18, reads, fontsize=8.5, color=INK, va="center")
        for token in range(prompt + new):
            x = 4.05 + token * 0.55 + (0.12 if token >= prompt else 0)
            box(axes, x, y, 0.49, 0.36, str(token + 1), colours[token] if token < prompt else ORANGE, 8.5)
            if token < prompt and read[token]:
                axes.plot([x + 0.05, x + 0.44], [y + 0.44, y + 0.44], color="#3b7fd4", linewidth=3)
        axes.text(4.05, y - 0.16, shared, fontsize=8, color="#555570", va="center")
    axes.text(4.05 + 1.62, 3.72, "prompt", ha="center", fontsize=9.5, weight="bold", color=INK)
    axes.text(4.17 + 6 * 0.55 + 0.8, 3.72, "new tokens", ha="center", fontsize=9.5, weight="bold", color=INK)
    for x, colour, text in ((0.2, ORANGE, "adapted by the chosen experts"), (2.75, GREY, "bare backbone")):
        box(axes, x, 0.06, 0.3, 0.2, "", colour)
        axes.text(x + 0.38, 0.16, text, fontsize=8.5, va="center", color=INK)
    axes.plot([4.4, 4.7], [0.16, 0.16], color="#3b7fd4", linewidth=3)
    axes.text(4.8, 0.16, "read by the router", fontsize=8.5, va="center", color=INK)
    return figure


def main() -> None:
    """Writes all pictures."""
    mpl.rcParams["svg.hashsalt"] = "milora"
    mpl.rcParams["font.family"] = ["DejaVu Sans"]
    for name, draw in (("routing", routing), ("late-adaptation", cache)):
        draw().savefig(IMAGES / f"{name}.svg", facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()
