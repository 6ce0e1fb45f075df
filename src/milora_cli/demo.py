"""`milora demo`: fine-tunes a backbone and shows the result."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from milora_cli import options


def command(
    output: Annotated[Path, typer.Option("--output", help="Folder for the adapters and the picture.")] = Path(
        "out/demo"
    ),
    backbone: Annotated[
        str,
        typer.Option(
            "--backbone",
            help="tiny (bundled), a model folder or a hub name; pretrained models train on the shop tasks.",
        ),
    ] = "tiny",
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Optimiser steps; by default 450 for tiny, else 90.")
    ] = None,
    test_rows: Annotated[int, typer.Option("--test-rows", min=1, help="Test rows of each task.")] = 40,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=options.LARGEST_SEED, help="Seed of data and training.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Fine-tune MiLoRA on a backbone, measure it, draw its routes, serve two tenants in one batch."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    # Libraries print to standard output, some on import; only the result belongs there.
    with contextlib.redirect_stdout(sys.stderr):
        # First, because it names the extra if the libraries of training are missing.
        from milora.demo import DemoSettings, run_demo
        from milora.locks import writing_alone

        from datasets import disable_progress_bars  # isort: skip
        from milora_cli.output import print_table, quiet_libraries
        from milora_core.files import writing

        quiet_libraries()
        # Bars of preparing a few thousand rows; the trainer's own bar stays.
        disable_progress_bars()

        progress = Console(stderr=True)

        def watch(items: Any, what: str, count: int) -> Any:
            return track(items, description=what, total=count, console=progress, transient=True)

        with writing_alone(output, "wait until it ends, or use another --output"), writing(output):
            settings = DemoSettings.for_backbone(backbone, steps=steps, test_rows=test_rows, seed=seed)
            result = run_demo(output, settings, progress.print, watch)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
        return
    table = Table(title=f"Test accuracy, beam {settings.beams}, {test_rows} rows per task")
    for name, justify in (("task", "left"), ("before", "right"), ("after", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for task, accuracy in result.tasks.items():
        table.add_row(task, f"{accuracy['before']:.1%}", f"{accuracy['after']:.1%}")
    print_table(table)
    console = Console()
    console.print("\nOne batch, one prompt, two tenants and the bare backbone:\n")
    console.print(result.tenants["prompt"], markup=False, highlight=False, style="dim")
    for name, answer in result.tenants["answers"].items():
        console.print(f"  {name:>10}: {answer}", markup=False, highlight=False)
    console.print(f"\nadapter   {result.adapter}\nheat map  {result.heat_map}\n{result.seconds:.0f} seconds")
