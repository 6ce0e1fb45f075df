"""What `adapter_names` says of a batch: which rows are each adapter's."""

from __future__ import annotations

from milora_core.errors import MiLoraError

BASE_ROW = "__base__"
"""PEFT's name for a row without an adapter."""


def rows_by_adapter(names: list[str], rows: int) -> dict[str, list[int]]:
    """Adapter -> its rows, in a batch of `rows` rows; beams of a row follow each other.

    Args:
        names: The adapter of each prompt, [`BASE_ROW`] for none.
        rows: How many rows the batch has.

    Raises:
        MiLoraError: If the rows are not a multiple of the names.
    """
    by_adapter: dict[str, list[int]] = {}
    for row, name in enumerate(names_of_rows(names, rows)):
        if name != BASE_ROW:
            by_adapter.setdefault(name, []).append(row)
    return by_adapter


def names_of_rows(names: list[str], rows: int) -> list[str]:
    """The adapter of each row; see [`rows_by_adapter`]."""
    if not names or rows % len(names) != 0:
        raise MiLoraError(f"adapter_names names {len(names)} rows; the batch has {rows}.")
    return [name for name in names for _ in range(rows // len(names))]
