"""Figures as printed in the paper (Zhang et al. 2024, arXiv 2410.18035), to set measured ones beside.

They stand in `published.json` as they do in the paper: tables by the paper's names of rows and columns. Here they are
by our names of methods and tasks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

BACKBONE = "llama-2-7b"
"""The shape that all tables but Table 7 are about."""

TUNABLE: Mapping[str, int] = {
    "parallel-adapter": 83_900_000,
    "learned-adapter": 81_800_000,
    "p-tuning-v2": 84_500_000,
    "iapt": 83_900_000,
    "bitfit": 87_000_000,
    "ia3": 78_600_000,
    "ssp": 80_600_000,
    "lora": 80_000_000,
    "adalora": 80_000_000,
    "moelora": 87_300_000,
    "dora": 80_000_000,
    "milora": 80_900_000,
    "midora": 80_900_000,
}
"""Tunable parameters of each method in Table 1, which gives them in millions with one decimal."""

TABLES: Mapping[str, str] = {
    "table1": "table1_single_task_llama2_7b",
    "table2": "table2_multi_task_llama2_7b",
    "table3": "table3_instruction_tuning_llama2_7b",
    "table5": "table5_ablation_llama2_7b",
}
"""The tables whose rows have a number in each column, by where they stand in the file."""

_FILE = Path(__file__).with_name("published.json")
_TASKS = {"mt_bench_gpt4": "mt-bench"}


@cache
def everything() -> dict[str, Any]:
    """The file as it is."""
    content: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return content


def columns(table: str) -> list[str]:
    """The columns of one of [`TABLES`], tasks by our names (`arc-easy`), others as in the file (`tunable_m`)."""
    return [_column(name) for name in everything()[TABLES[table]]["columns"]]


def row(table: str, label: str) -> dict[str, float]:
    """A row of one of [`TABLES`] by column; empty where the paper has no such row.

    Args:
        table: One of [`TABLES`].
        label: The row's name in the paper, such as `MiLoRA`, `MiLoRA MT` or `MiLoRA-3 (GeLU)`.
    """
    values = everything()[TABLES[table]].get(label)
    return {} if values is None else dict(zip(columns(table), values, strict=True))


def rows(table: str) -> list[str]:
    """The names of the rows of one of [`TABLES`], in their order."""
    return [label for label in everything()[TABLES[table]] if label != "columns"]


def table7() -> dict[str, list[dict[str, float]]]:
    """Table 7: by backbone, the two rows, of which the text says that the second, higher one is MiLoRA's."""
    content = everything()["table7_backbones"]
    names = [_column(name) for name in content["columns"]]
    return {
        backbone: [dict(zip(names, values, strict=True)) for values in pair]
        for backbone, pair in content.items()
        if backbone not in ("columns", "note")
    }


def table4() -> dict[str, list[tuple[int, float, int]]]:
    """Table 4: by method's title, (beams, tokens a second, peak memory in MiB)."""
    content = everything()["table4_efficiency_llama2_7b_a40"]
    return {
        name: [(int(beam), float(speed), int(memory)) for beam, speed, memory in values]
        for name, values in content.items()
        if name != "columns"
    }


def dataset(task: str) -> dict[str, int | None]:
    """Table 6: how many rows a task has to train on, of dev and to test on; `None` where it has none of its own.

    Empty where the paper has no such task.
    """
    content = everything()["table6_datasets"]
    rows: dict[str, list[int | None]] = {_column(name): counts for name, counts in content.items() if name != "columns"}
    return dict(zip(content["columns"], rows[task], strict=True)) if task in rows else {}


def figure(name: str) -> str:
    """What the paper says of a figure (`figure2` to `figure5`), whose points it does not print as numbers."""
    return str(everything()["figures"][name])


def _column(name: str) -> str:
    return _TASKS.get(name, name if name.endswith("_m") else name.replace("_", "-"))
