"""The picture of a trained adapter's routes on the dev set."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from milora.plots import route_heat_map
from milora.tuners.milora import MiLoraModel
from milora_core.routing import Route

LARGEST_SAMPLE = 64
"""Maximum number of prompts per source."""


def draw_routes(model: Any, rows: Any, collate: Any, counts: Mapping[str, int], path: Path, batch: int = 8) -> bool:
    """Draws the share of prompts that choose each expert, one panel per source.

    Args:
        model: A `PeftModel`.
        rows: Tokenised rows with labels, ordered by source.
        collate: Makes a batch from a list of rows.
        counts: Rows of each source, in order.
        path: Where to write.
        batch: Rows at a time.

    Returns:
        Whether a picture was drawn; not without routers, rows or matplotlib.
    """
    if not isinstance(model.base_model, MiLoraModel) or rows is None or importlib.util.find_spec("matplotlib") is None:
        return False
    device = next(model.parameters()).device
    stems = [Path(name).stem for name in counts]
    panels: dict[str, Route] = {}
    first = 0
    for name, count in counts.items():
        chosen = range(first, min(first + min(count, LARGEST_SAMPLE), len(rows)))
        first += count
        routes = []
        for start in range(0, len(chosen), batch):
            inputs = collate([rows[index] for index in chosen[start : start + batch]])
            routes.append(model.route(**{key: value.to(device) for key, value in inputs.items()}))
        if routes:
            # A file by its name only, unless another source has the same name.
            stem = Path(name).stem
            panels[stem if stems.count(stem) == 1 else name] = Route.cat(routes)
    if panels:
        route_heat_map(panels, path)
    return bool(panels)
