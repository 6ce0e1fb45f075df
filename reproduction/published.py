"""The numbers printed in the paper (Zhang et al. 2024, arXiv 2410.18035), for comparison with measured ones.

`published.json` holds the paper's tables with the paper's names of rows and columns. This module returns them by our
names of methods and tasks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

TABLES: Mapping[str, str] = {
    "table1": "table1_single_task_llama2_7b",
    "table2": "table2_multi_task_llama2_7b",
    "table3": "table3_instruction_tuning_llama2_7b",
    "table5": "table5_ablation_llama2_7b",
}
"""The tables with a number in each column, and their keys in the file."""

_TASKS = {"mt_bench_gpt4": "mt-bench"}


@cache
def everything() -> dict[str, Any]:
    """The content of the file."""
    content: dict[str, Any] = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    return content


def row(table: str, label: str) -> dict[str, float]:
    """The row of one of [`TABLES`] with a name such as `MiLoRA MT`, by column; empty if the paper has no such row."""
    values = everything()[TABLES[table]].get(label)
    return {} if values is None else dict(zip(_columns(table), values, strict=True))


def tasks(table: str) -> list[str]:
    """The tasks among the columns of one of [`TABLES`]."""
    return [name for name in _columns(table) if not name.endswith("_m") and name != "avg"]


def table7() -> dict[str, list[dict[str, float]]]:
    """Table 7: the two rows of each backbone. According to the paper's text, the second, higher row is MiLoRA's."""
    content = dict(everything()["table7_backbones"])
    names = [_column(name) for name in content.pop("columns")]
    del content["note"]
    return {on: [dict(zip(names, values, strict=True)) for values in pair] for on, pair in content.items()}


def table4() -> dict[str, list[tuple[int, float, int]]]:
    """Table 4, by the method's title: (beams, tokens per second, peak memory in MiB)."""
    content = everything()["table4_efficiency_llama2_7b_a40"]
    return {name: list(map(tuple, values)) for name, values in content.items() if name != "columns"}


def dataset(task: str) -> dict[str, int | None]:
    """Table 6: a task's numbers of train, dev and test rows; `None` if the task does not have the split."""
    content = everything()["table6_datasets"]
    rows: dict[str, list[int | None]] = {_column(name): counts for name, counts in content.items() if name != "columns"}
    return dict(zip(content["columns"], rows[task], strict=True)) if task in rows else {}


def _columns(table: str) -> list[str]:
    """Tasks by our names (`arc-easy`), other columns as in the file (`tunable_m`)."""
    return [_column(name) for name in everything()[TABLES[table]]["columns"]]


def _column(name: str) -> str:
    return _TASKS.get(name, name if name.endswith("_m") else name.replace("_", "-"))
