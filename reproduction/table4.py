"""Table 4: speed and memory of decoding, measured by `milora.benchmark` and stored beside the other results."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from milora.benchmark import DecodeSettings, decode
from milora.benchmark.rounds import disturbed
from milora.methods import method
from milora_core.errors import MiLoraError
from milora_core.files import write_json
from reproduction import published
from reproduction.store import Store

FILE = "table4.json"
METHODS = ("base", "dora-cached", "moelora", "milora")
"""DoRA with PEFT's cache: without it DoRA computes the norms of all weights for every token."""

TITLES = {"base": "the backbone alone", "dora-cached": "DoRA (cached)"}


def table4(store: Store, say: Callable[[str], None] = lambda _: None, measure: bool = True) -> list[dict[str, Any]]:
    """The rows of Table 4. They are measured if `table4.json` is not in the folder and `measure` is true.

    Older files may contain disturbed rounds; their numbers are left out. Raises a [`MiLoraError`] if the file is
    missing and `measure` is false, or if it cannot be read.
    """
    path = store.folder / FILE
    if not path.exists():
        if not measure:
            raise MiLoraError("not measured yet")
        store.prepare()
        # Two processes that measure at the same time would disturb each other.
        with store.lock("table4"):
            if not path.exists():
                write_json(path, decode(DecodeSettings(methods=METHODS, beams=(1, 3)), say).to_dict())
    try:
        measured = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MiLoraError(f"{path} is no measurement of milora bench decode; remove it to measure again.") from error
    rounds = {(row["method"], row["beam"]): row["rounds"] for row in measured}
    return [_row(row, rounds) for row in measured if row["method"] in METHODS]


def _row(row: Mapping[str, Any], rounds: Mapping[tuple[str, int], list[float]]) -> dict[str, Any]:
    name, beam, own = row["method"], row["beam"], row["rounds"]
    left_out = disturbed(rounds["base", beam])
    kept = [index for index in range(len(own)) if index not in left_out]
    printed = published.table4()
    title = TITLES.get(name) or method(name).title
    speed, memory = printed.get((title.removesuffix(" (cached)"), beam), (None, "-"))
    ours, our_rounds = printed[method("milora").title, beam][0], rounds["milora", beam]
    is_milora = name == "milora"
    return {
        "": title,
        "beam": beam,
        "new tokens": row["new_tokens"],
        "rounds": len(kept),
        "tokens a second": _spread([own[index] for index in kept], 1),
        "paper": "-" if speed is None else f"{speed:g}",
        "MiLoRA's / its": "-" if is_milora else _spread([our_rounds[index] / own[index] for index in kept], 2),
        "paper's ratio": "-" if is_milora or speed is None else f"{ours / speed:.2f}",
        "peak memory, MiB": f"{row['peak_memory_mib']:.0f}",
        "paper's, MiB": str(memory),
    }


def _spread(values: list[float], digits: int) -> str:
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
