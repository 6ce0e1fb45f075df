"""Compact routes for files of predictions, and statistics over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from milora_core.routing import Route


def compact_route(route: Route, row: int = 0) -> dict[str, list[int]]:
    """A prompt's route in compact form: expert -> the numbers of the blocks that chose it.

    Every expert is a key, even without blocks. A block's number is the end of its path (`model.layers.7` is 7). For
    shares over many rows, see [`expert_shares`].
    """
    numbers = [int(block.rpartition(".")[2]) for block in route.blocks]
    chosen = route.chosen[:, row].tolist()
    return {
        expert: [number for number, of_block in zip(numbers, chosen, strict=True) if of_block[column]]
        for column, expert in enumerate(route.experts)
    }


def expert_shares(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Statistics over rows of predictions: expert -> block -> the share of prompts that chose the expert there.

    Rows without a route are ignored. Every expert has an entry for every block in which any expert was chosen.
    """
    routes = [row["route"] for row in rows if row.get("route")]
    numbers = sorted({number for route in routes for blocks in route.values() for number in blocks})
    counts: dict[str, dict[int, int]] = {}
    for route in routes:
        for expert, blocks in route.items():
            of_expert = counts.setdefault(expert, dict.fromkeys(numbers, 0))
            for number in blocks:
                of_expert[number] += 1
    return {
        expert: {number: count / len(routes) for number, count in of_expert.items()}
        for expert, of_expert in counts.items()
    }
