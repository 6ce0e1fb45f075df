"""Options that several sub-commands share, each defined once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer


def _expanded(path: Path | None) -> Path | None:
    # The shell does not expand `~` in an environment variable.
    return None if path is None else path.expanduser()


def not_nan(value: float) -> float:
    """Refuses NaN, which an option's `min` lets pass in older versions of click."""
    if math.isnan(value):
        raise typer.BadParameter(f"found {value}; give a number.")
    return value


def finite(value: float) -> float:
    """Refuses NaN and infinity."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"found {value}; give a finite number.")
    return value


Adapter = Annotated[str, typer.Option("--adapter", metavar="DIR", help="Folder or hub id of the adapter.")]
Backbone = Annotated[
    str | None,
    typer.Option("--backbone", metavar="NAME", help="'tiny', a folder or a hub id; by default the adapter's own."),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", metavar="TEXT", help="A prompt; can be repeated."),
]
LARGEST_SEED = 2**32 - 1
"""The largest seed that NumPy accepts."""

Split = Annotated[str, typer.Option("--split", help="Split of a task, folder or hub dataset.")]
DataDirectory = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        envvar="MILORA_DATA_DIR",
        callback=_expanded,
        help="Folder of the benchmarks' files in LLM-Adapters' layout; by default they come from the hub.",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", min=1, help="Use only the first rows."),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Prompts per batch.")]
Device = Annotated[
    str | None,
    typer.Option("--device", help="Such as cpu or cuda:1; by default a GPU if there is one."),
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (as the backbone was saved), float32, bfloat16 or float16.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on standard output.")]


def is_from_environment(context: typer.Context, parameter: str) -> bool:
    """Whether a parameter's value comes from an environment variable; a settings file takes precedence over it."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "ENVIRONMENT"
