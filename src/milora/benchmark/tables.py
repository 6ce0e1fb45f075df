"""Formats results as tables, for a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from milora.markdown import markdown_table

WIDEST = 1000
NOTHING = "-"
Cell = Callable[[Mapping[str, Any]], str]


def _number(key: str, digits: int) -> Cell:
    return lambda row: NOTHING if row.get(key) is None else f"{row[key]:.{digits}f}"


def _range(key: str, digits: int) -> Cell:
    def cell(row: Mapping[str, Any]) -> str:
        return f"{row[key]:.{digits}f} ({row[f'{key}_low']:.{digits}f}-{row[f'{key}_high']:.{digits}f})"

    return cell


def _ratio(other: str) -> Cell:
    def cell(row: Mapping[str, Any]) -> str:
        found = row["ratios"].get(other)
        if found is None:
            return "1" if row["method"] == other else NOTHING
        return f"{found['median']:.3f} ({found['low']:.3f}-{found['high']:.3f})"

    return cell


def _share(row: Mapping[str, Any]) -> str:
    return NOTHING if row["routing_share"] is None else f"{row['routing_share']:.2%}"


def _memory_ratio(other: str) -> Cell:
    def cell(row: Mapping[str, Any]) -> str:
        found = row["memory_ratios"].get(other)
        return f"{found:.3f}" if found is not None else "1" if row["method"] == other else NOTHING

    return cell


_DECODE: Mapping[str, Cell] = {
    "beam": _number("beam", 0),
    "batch": _number("batch", 0),
    "tokens/s": _range("tokens_per_second", 2),
    "/ base": _ratio("base"),
    "/ lora": _ratio("lora"),
    "peak MiB": _number("peak_memory_mib", 0),
    "weights GB/s": _number("weight_gigabytes_per_second", 1),
    "of bandwidth": _number("share_of_bandwidth", 2),
    "new": _number("new_tokens", 0),
}
COLUMNS: Mapping[str, Mapping[str, Cell]] = {
    "decode": _DECODE,
    "prefill": {
        "batch": _number("batch", 0),
        "prompt": _number("prompt_tokens", 0),
        "first token, s": _range("seconds_to_first_token", 3),
        "/ base": _ratio("base"),
        "/ lora": _ratio("lora"),
        "routing": _share,
        "peak MiB": _number("peak_memory_mib", 0),
    },
    "train": {
        "batch": _number("batch", 0),
        "tokens": _number("tokens", 0),
        "step, s": _range("seconds_per_step", 3),
        "/ lora": _ratio("lora"),
        "/ milora": _ratio("milora"),
        "peak MiB": _number("peak_memory_mib", 0),
        "memory / lora": _memory_ratio("lora"),
    },
    "tenants": {"tenants": _number("tenants", 0), **_DECODE},
    "kernel": {
        "rows": _number("batch", 0),
        "us a call": _range("microseconds", 1),
        "/ reference": _ratio("reference"),
        "GB/s": _range("gigabytes_per_second", 1),
        "of bandwidth": _range("share_of_bandwidth", 3),
        "largest error": _number("largest_error", 5),
    },
    "traffic": {
        "batch": _number("batch", 0),
        "context": _number("context", 0),
        "weights, MB": _number("weight_megabytes", 1),
        "adapter, MB": _number("adapter_megabytes", 2),
        "cache, MB": _number("cache_megabytes", 1),
        "MB a step": _number("megabytes", 1),
        "GFLOP a step": _number("gigaflops", 3),
        "/ base": _number("bytes_ratio_to_base", 4),
    },
}
"""The columns of each command's table. Numbers in parentheses are the minimum and the maximum."""


def cells(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a result's table, without empty columns."""
    rows = result["rows"]
    columns = {name: [cell(row) for row in rows] for name, cell in COLUMNS[result["command"]].items()}
    shown = {name: texts for name, texts in columns.items() if set(texts) != {NOTHING}}
    return ["method", *shown], [[row["method"], *texts] for row, *texts in zip(rows, *shown.values(), strict=True)]


def title(result: Mapping[str, Any]) -> str:
    """The benchmark, the backbone and the device."""
    settings, environment = result["settings"], result["environment"]
    parts = [f"{result['command']}: {settings['backbone']}"]
    if result["command"] == "kernel":
        sizes = (settings["d_in"], settings["d_out"], settings["rank"], settings["active"])
        parts = ["kernel: {} to {}, rank {}, every {}. row active".format(*sizes)]
    if settings.get("layers"):
        parts.append(f"{settings['layers']} blocks")
    parts += [settings["dtype"], f"adapters {settings['adapter_dtype']}"]
    if environment:
        parts += ["compiled"] if settings.get("compile") else []
        gpu = environment["gpu"]
        parts.append(gpu["name"] if gpu else f"{environment['processor']}, {environment['threads']} threads")
        parts.append(f"{settings['rounds']} rounds")
    return ", ".join(parts)


def notes(result: Mapping[str, Any]) -> list[str]:
    """Notes below a result's table: the rows of a compiled measurement that ran eagerly, with the reason."""
    reasons: dict[str, list[str]] = {}
    for row in result["rows"]:
        if row.get("not_compiled"):
            reasons.setdefault(row["not_compiled"], []).append(f"{row['method']} (beam {row['beam']})")
    return [f"Not compiled: {', '.join(dict.fromkeys(named))}: {reason}." for reason, named in reasons.items()]


def print_table(result: Mapping[str, Any]) -> None:
    """Prints a result's table on standard output."""
    header, rows = cells(result)
    table = Table(title=title(result), title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Truncated numbers are useless, so the table may exceed the terminal's width.
    needed = Console(width=WIDEST).measure(table).maximum
    console = Console(width=max(Console().width, needed))
    console.print(table)
    for note in notes(result):
        console.print(note, markup=False, highlight=False)


def markdown(result: Mapping[str, Any]) -> str:
    """A result's table in Markdown, with its title above."""
    header, rows = cells(result)
    return "\n\n".join([title(result), markdown_table(header, rows), *notes(result)]) + "\n"
