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
    "table7": "table7_backbones",
}
"""The tables with a number in each column, and their keys in the file."""


@cache
def everything() -> dict[str, Any]:
    """The content of the file."""
    content: dict[str, Any] = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    return content


def row(table: str, label: str) -> dict[str, float]:
    """A row with a name such as `MiLoRA MT`, by column; empty if the paper has no such row.

    Table 7 has two unnamed rows for each backbone. According to the paper's text, the second row is MiLoRA's.
    """
    content = everything().get(TABLES.get(table, ""), {})
    if table == "table7":
        backbone, _, method = label.partition(": ")
        values = content[backbone][method == "MiLoRA"] if backbone in content else None
    else:
        values = content.get(label)
    return {} if values is None else dict(zip(map(_column, content["columns"]), values, strict=True))


def tasks(table: str) -> list[str]:
    """The tasks among the columns of one of [`TABLES`]."""
    names = map(_column, everything()[TABLES[table]]["columns"])
    return [name for name in names if not name.endswith("_m") and name != "avg"]


def table4() -> dict[tuple[str, int], tuple[float, int]]:
    """Table 4: tokens a second and peak memory in MiB, by method's title and beams."""
    content = everything()["table4_efficiency_llama2_7b_a40"].items()
    return {
        (name, beam): (speed, memory) for name, rows in content if name != "columns" for beam, speed, memory in rows
    }


def _column(name: str) -> str:
    """A task by our name (`arc-easy`); other columns as in the file (`tunable_m`)."""
    return "mt-bench" if name == "mt_bench_gpt4" else name if name.endswith("_m") else name.replace("_", "-")
