"""Checks the fields of a benchmark's records. Errors name the row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from milora.tasks.rows import json_type
from milora_core.errors import DataError

_KINDS: dict[type, str] = {
    str: "a string",
    int: "a number",
    bool: "a boolean",
    list: "a list of strings",
    dict: "an object",
}


def check_fields(record: object, fields: Mapping[str, type], where: str) -> Mapping[str, Any]:
    """The record, after a check that it has all fields with the right types. A list must be a list of strings.

    Args:
        record: A value from a file or a dataset.
        fields: The required fields and their types: `str`, `int`, `bool`, `list` or `dict`.
        where: The record's location, such as `test.jsonl, line 3`.

    Raises:
        DataError: the record is not an object, or a field is missing, null or of another type.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: a row is {json_type(record)}, it must be an object with {_listed(fields)}")
    for field, kind in fields.items():
        value = record.get(field)
        if value is None:
            found = ", ".join(f"`{name}`" if item is not None else f"`{name}` (null)" for name, item in record.items())
            raise DataError(f"{where}: `{field}` is missing; fields found: {found or 'none'}")
        is_kind = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
        if not is_kind or (kind is list and not all(isinstance(item, str) for item in value)):
            raise DataError(f"{where}: `{field}` is {json_type(value)}, it must be {_KINDS[kind]}")
    return record


def _listed(fields: Mapping[str, type]) -> str:
    return ", ".join(f"`{field}`" for field in fields)
