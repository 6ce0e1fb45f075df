"""`milora params`: how many parameters each method trains and how many are active per token."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from milora_cli import options
from milora_cli.output import json_only, print_table, progress_bar, quiet_libraries
from milora_core.errors import MiLoraError

MILLION = 1_000_000


def command(
    backbone: Annotated[
        str,
        typer.Option(
            "--backbone", metavar="NAME", help="A shape such as llama-2-7b or gemma-2b, 'tiny', or a folder's config."
        ),
    ] = "llama-2-7b",
    methods: Annotated[
        str | None, typer.Option("--methods", metavar="A,B", help="Methods, separated by commas; by default all.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Count each method's parameters at the paper's settings, on a backbone without weights (seconds, no memory)."""
    with json_only(as_json) as print_result:
        from milora.backbone.shapes import shape_config
        from milora.methods import METHODS, PAPER_BACKBONE, method, parameter_counts

        quiet_libraries()
        config = shape_config(backbone)
        names = list(METHODS) if methods is None else [name.strip() for name in methods.split(",") if name.strip()]
        if not names:
            raise MiLoraError(f"--methods has no names; give some of {', '.join(METHODS)}.")
        titles = {name: method(name).title for name in names}
        rows: list[dict[str, Any]] = []
        with progress_bar() as progress:
            task = progress.add_task("Counting", total=len(names))
            for name in names:
                counts = parameter_counts(name, config)
                rows.append(
                    {
                        "method": name,
                        "tunable": counts.tunable,
                        "activated_mean": counts.activated_mean,
                        "activated_max": counts.activated_max,
                        "paper_tunable": method(name).paper_tunable if backbone == PAPER_BACKBONE else None,
                    }
                )
                progress.advance(task)
        print_result({"backbone": backbone, "methods": rows})
        if not as_json:
            _print_table(backbone, rows, titles)


def _print_table(backbone: str, rows: list[dict[str, Any]], titles: dict[str, str]) -> None:
    from rich.table import Table

    with_paper = any(row["paper_tunable"] is not None for row in rows)
    table = Table(title=f"Parameters on {backbone}, in millions", title_justify="left")
    table.add_column("method", no_wrap=True)
    for column in ["tunable", *(["paper", "differs"] if with_paper else []), "activated (mean)", "activated (most)"]:
        table.add_column(column, justify="right")
    for row in rows:
        paper = row["paper_tunable"]
        beside = [f"{paper / MILLION:.1f}", f"{row['tunable'] / paper - 1:+.1%}"] if paper is not None else []
        activated = [f"{row[key] / MILLION:.2f}" for key in ("activated_mean", "activated_max")]
        table.add_row(titles[row["method"]], f"{row['tunable'] / MILLION:.2f}", *beside, *activated)
    print_table(table)
