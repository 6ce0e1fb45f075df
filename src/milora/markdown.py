"""Tables in Markdown. Needs tabulate: `pip install "milora[cli]"`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from milora_core.errors import importing

with importing("cli", "A table in Markdown"):
    from tabulate import tabulate


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]], *, left: int = 1) -> str:
    """A table in GitHub's Markdown, without a newline at its end.

    Args:
        header: The columns' names.
        rows: Cells, converted with `str`. `|` is escaped, and newlines become spaces.
        left: Number of first columns that are left-aligned. The others have numbers and are right-aligned.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    align = ["left" if index < left else "right" for index in range(len(header))]
    return tabulate(cells, [_cell(name) for name in header], tablefmt="pipe", colalign=align, disable_numparse=True)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
