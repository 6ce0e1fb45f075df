"""Reads a request from a YAML file and from the command line: names, numbers and the shapes of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from milora.paper.request import SECTIONS, Evaluation, ReportRequest
from milora.paper.request_checks import check_request, known
from milora_core.errors import MiLoraError, did_you_mean

MAPPINGS: Mapping[str, str] = {
    "training": "{max_steps: 100}",
    "data": "{train_rows: 960}",
    "evaluation": "{beams: 1}",
    "methods": "{lora: {learning_rate: 1e-3}}",
    "tune": "{learning_rate: [1e-3, 3e-3]}",
    "limits": "{figure3: {values: [1, 3]}}",
    "other_backbones": "{Gemma 2B: google/gemma-2b}",
}
"""The fields of a request that are mappings, with an example of each."""

OF_MAPPINGS = ("methods", "limits")
"""Those whose values are mappings in turn."""

LISTS: Mapping[str, str] = {
    "sections": "[table1, figure3]",
    "tasks": "[boolq, piqa]",
    "seeds": "[0, 1, 2]",
    "only_methods": "[lora, milora]",
}
"""The fields that are lists; a single value, or a text with commas, is one too."""

WITH_NUMBERS = ("training", "data", "methods", "tune", "limits", "evaluation")


def read_request(path: Path | None, flags: Mapping[str, Any]) -> ReportRequest:
    """The request that a YAML file and flags, which override it, stand for.

    Args:
        path: The file, with fields of [`ReportRequest`]; `None` for the defaults.
        flags: Fields by name; mappings are merged into the file's.

    Raises:
        MiLoraError: If the file cannot be read, a name is unknown, a value has another form than its field, is out of
            range or would be refused by every run.
    """
    values = _shaped(_read(path)) if path is not None else {}
    for name, value in _shaped(flags).items():
        values[name] = {**values.get(name, {}), **value} if name in MAPPINGS else value
    values["evaluation"] = _evaluation(values.get("evaluation", {}))
    values["sections"] = tuple(dict.fromkeys(map(section_name, values.get("sections", SECTIONS))))
    request = ReportRequest(**values)
    check_request(request)
    return request


def section_name(name: Any) -> str:
    """`table1` for `1`, `table1`, `table-1` or `Table 1`.

    Raises:
        MiLoraError: If there is no such section.
    """
    short = str(name).lower().replace(" ", "").replace("_", "-")
    for candidate in (short, f"table{short}", short.replace("-", "")):
        if candidate in SECTIONS:
            return candidate
    raise MiLoraError(f"There is no section {name!r}; there are {', '.join(SECTIONS)}{did_you_mean(short, SECTIONS)}")


def parse_settings(texts: Sequence[str], option: str = "--set", example: str = "learning_rate=1e-3") -> dict[str, Any]:
    """`["learning_rate=1e-3"]` as a mapping, values read as YAML.

    Args:
        texts: What the option was given.
        option: Its name, for messages.
        example: Of a value of it, for messages.

    Raises:
        MiLoraError: If a text has no name or no value.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not name or not sign:
            raise MiLoraError(f"{option} takes name=value, such as {example}; found {text!r}.")
        found[name.strip().replace("-", "_")] = number(value)
    return found


def number(text: str) -> Any:
    """What people mean by a text: a number, a truth value, nothing (`null`), or the text."""
    words: dict[str, Any] = {"true": True, "false": False, "null": None, "none": None}
    if text.strip().lower() in words:
        return words[text.strip().lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _read(path: Path) -> Mapping[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MiLoraError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise MiLoraError(f"{path} must hold a mapping, such as 'tasks: [bundled-choice]'; found {_told(values)}.")
    known(str(path), values, [one.name for one in fields(ReportRequest)])
    return values


def _shaped(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields in the form that a request has them in: mappings as such, lists as tuples, texts of numbers as numbers."""
    found = {}
    for name, value in values.items():
        value = _numbers(value) if name in WITH_NUMBERS else value
        if name in MAPPINGS:
            value = dict(_mapping(name, value, MAPPINGS[name]))
        elif name in LISTS:
            value = _listed(name, value, LISTS[name])
        if name in OF_MAPPINGS:
            value = {key: dict(_mapping(f"{name}: {key}", inner, MAPPINGS[name])) for key, inner in value.items()}
        found[name] = value
    if "tune" in found:
        found["tune"] = {
            key: _numbers(_listed(f"tune: {key}", tried, "[1e-3]")) for key, tried in found["tune"].items()
        }
    if "limits" in found:
        found["limits"] = {
            section: {key: _numbers(_listed(f"limits: {section}: {key}", one, "[1, 3]")) for key, one in limits.items()}
            for section, limits in found["limits"].items()
        }
    return found


def _evaluation(values: Mapping[str, Any]) -> Evaluation:
    names = [one.name for one in fields(Evaluation)]
    for name in values:
        if name not in names:
            raise MiLoraError(f"evaluation has no field {name!r}; it has {', '.join(names)}{did_you_mean(name, names)}")
    for name, value in values.items():
        least = 0 if name == "dev_rows" else 1
        is_all = value is None and name == "test_rows"
        if not is_all and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise MiLoraError(f"evaluation: {name} must be a whole number of at least {least}; found {_told(value)}.")
    return Evaluation(**values)


def _mapping(where: str, value: Any, example: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise MiLoraError(
            f"{where} must be a mapping, as in '{where.partition(':')[0]}: {example}'; found {_told(value)}."
        )
    return value


def _listed(where: str, value: Any, example: str) -> tuple[Any, ...]:
    if isinstance(value, str):
        return tuple(part for part in value.replace(",", " ").split() if part)
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    for one in values:
        if not isinstance(one, str | int | float):
            raise MiLoraError(f"{where} must be a list, such as {example}; found {_told(one)}.")
    return values


def _numbers(value: Any) -> Any:
    """A value of a YAML file with 1e-3, which YAML takes for a text, as the number that people mean by it."""
    if isinstance(value, Mapping):
        return {name: _numbers(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    if isinstance(value, tuple):
        return tuple(_numbers(inner) for inner in value)
    return number(value) if isinstance(value, str) else value


def _told(value: Any) -> str:
    return "nothing" if value is None else repr(value)
