"""Results as tables, on a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

Cell = Callable[[Mapping[str, Any]], str]


def _number(key: str, digits: int) -> Cell:
    return lambda row: "-" if row.get(key) is None else f"{row[key]:.{digits}f}"


def _range(key: str, digits: int) -> Cell:
    def cell(row: Mapping[str, Any]) -> str:
        return f"{row[key]:.{digits}f} ({row[f'{key}_low']:.{digits}f}-{row[f'{key}_high']:.{digits}f})"

    return cell


def _ratio(other: str) -> Cell:
    def cell(row: Mapping[str, Any]) -> str:
        found = row["ratios"].get(other)
        if found is None:
            return "1" if row["method"] == other else "-"
        return f"{found['median']:.3f} ({found['low']:.3f}-{found['high']:.3f})"

    return cell


COLUMNS: Mapping[str, Mapping[str, Cell]] = {
    "decode": {
        "beam": _number("beam", 0),
        "batch": _number("batch", 0),
        "tokens/s": _range("tokens_per_second", 2),
        "/ base": _ratio("base"),
        "/ lora": _ratio("lora"),
        "peak MiB": _number("peak_memory_mib", 0),
        "new tokens": _number("new_tokens", 0),
    },
}
"""What each command's table shows beside the method; numbers in parentheses are the least and the greatest."""


def cells(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a result's table."""
    columns = COLUMNS[result["command"]]
    return ["method", *columns], [[row["method"], *(cell(row) for cell in columns.values())] for row in result["rows"]]


def title(result: Mapping[str, Any]) -> str:
    """What was measured, on what."""
    settings, environment = result["settings"], result["environment"]
    where = environment["gpu"]["name"] if environment["gpu"] else environment["processor"]
    compiled = ", compiled" if settings.get("compile") else ""
    depth = f", {settings['layers']} blocks" if settings.get("layers") else ""
    return (
        f"{result['command']}: {settings['backbone']}{depth}, {settings['dtype']}, adapters {settings['adapter_dtype']}"
        f"{compiled}, {where}, {environment['threads']} threads, {settings['rounds']} rounds"
    )


def print_table(result: Mapping[str, Any]) -> None:
    """Prints a result's table on standard output."""
    header, rows = cells(result)
    table = Table(title=title(result), title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def markdown(result: Mapping[str, Any]) -> str:
    """A result's table in Markdown, its title above."""
    header, rows = cells(result)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return f"{title(result)}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
