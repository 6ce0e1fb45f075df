"""`milora report`: the paper's tables and figures, from runs that are made where they are missing."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from milora_cli import options
from milora_cli.output import json_only, quiet_libraries
from milora_core.errors import MiLoraError

if TYPE_CHECKING:
    from milora.paper.plan import Plan

HOUR = 3600
MINUTE = 60

LEFT_OUT = ("--shard", "--output", "--data-dir", "--judge-url", "--seconds-per-run")
"""Options, each with a value, that a report does not show: where things are, and how the work is shared."""


def command(
    context: typer.Context,
    table: Annotated[
        list[str] | None,
        typer.Option("--table", metavar="N", help="1, 2, 3, 4, 5, 7 or router-choices; can be repeated."),
    ] = None,
    figure: Annotated[
        list[str] | None, typer.Option("--figure", metavar="N", help="2, 3, 4 or 5; can be repeated.")
    ] = None,
    settings: Annotated[
        Path | None,
        typer.Option("--settings", metavar="FILE", help="YAML with everything below and more; flags override it."),
    ] = None,
    backbone: options.Backbone = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="A,B", help="Instead of the paper's, where it has none of them.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", metavar="0,1,2", help="By default five, as in the paper.")
    ] = None,
    methods: Annotated[str | None, typer.Option("--methods", metavar="A,B", help="Leave out the others.")] = None,
    data_dir: options.DataDirectory = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="milora|paper|N",
            help="Tunable parameters of every method: MiLoRA's, the paper's settings as they are, or a number.",
        ),
    ] = None,
    training: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of training, such as max_steps=150; repeatable."),
    ] = None,
    tune: Annotated[
        list[str] | None,
        typer.Option(
            "--tune",
            metavar="NAME=A,B,C",
            help="Choose this setting of training for each method on dev with the first seed, from these values.",
        ),
    ] = None,
    test_rows: Annotated[int | None, typer.Option("--test-rows", min=1, help="Of each task; by default all.")] = None,
    beams: Annotated[int | None, typer.Option("--beams", min=1, help="1 is greedy; by default 3.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Prompts a batch in evaluation.")
    ] = None,
    judge_url: Annotated[
        str | None,
        typer.Option(
            "--judge-url",
            metavar="URL",
            help="OpenAI-compatible API that grades MT-Bench for Table 3; its key is MILORA_JUDGE_API_KEY or "
            "OPENAI_API_KEY.",
        ),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option("--judge-model", help="The judge's name there; by default gpt-4.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Results and report.")] = Path("out/report"),
    shard: Annotated[
        str | None, typer.Option("--shard", metavar="I/N", help="Make only this share of the runs: 1/2, 2/2.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs and estimate the time; change nothing.")
    ] = False,
    no_run: Annotated[
        bool, typer.Option("--no-run", help="Write the report from the runs that have finished.")
    ] = False,
    seconds_per_run: Annotated[
        float | None, typer.Option("--seconds-per-run", help="For the estimate, until a run has finished.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="torch's threads; 1 is best for small ones.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Make the paper's tables and figures: run what is missing, then write Markdown, CSV and PNG.

    Without --table and --figure all of them. Runs that have finished are never repeated, a call that was interrupted is
    gone on with by giving it again, and several processes may work on one output folder at once.
    """
    with json_only(as_json) as print_result:
        share = _shard(shard)
        of_environment = options.is_from_environment(context, "data_dir")
        evaluation = {"test_rows": test_rows, "beams": beams, "batch_size": batch_size}
        named = [*(table or []), *(f"figure{number}" for number in figure or [])]
        flags: dict[str, Any] = {
            "sections": named,
            "backbone": backbone,
            "tasks": tasks,
            "seeds": _numbers("--seeds", seeds),
            "only_methods": methods,
            "data_dir": str(data_dir) if data_dir and not of_environment else None,
            "budget": int(budget) if budget and budget.isdigit() else budget,
            "evaluation": {name: value for name, value in evaluation.items() if value is not None},
            "threads": threads,
            "judge_url": judge_url,
            "judge_model": judge_model,
        }

        import torch
        from datasets import disable_progress_bars

        from milora.paper.grid import Grid
        from milora.paper.plan import make_plan
        from milora.paper.report import write_report
        from milora.paper.request_checks import check_trainings
        from milora.paper.request_reading import parse_settings, read_request
        from milora.paper.store import ResultStore
        from milora.paper.worker import Worker

        flags["training"] = parse_settings(training or [])
        flags["tune"] = parse_settings(tune or [], "--tune", "learning_rate=1e-3,3e-3")
        request = read_request(settings, {name: value for name, value in flags.items() if value not in (None, [], {})})
        if of_environment and request.data_dir is None:
            request = replace(request, data_dir=str(data_dir))
        quiet_libraries()
        disable_progress_bars()
        if request.threads is not None:
            torch.set_num_threads(request.threads)
        grid = Grid(request)
        cells = grid.cells() if share is None else grid.shard(*share)
        store = ResultStore(output)
        plan = make_plan(grid, store.read(), cells, seconds_per_run)
        if dry_run:
            print_result(plan.to_dict())
            if not as_json:
                _print_plan(plan)
            return
        progress = None
        if not no_run:
            check_trainings(request, here=True)
            _say(_summary(plan))
            progress = Worker(grid, store, cells, say=_say).work()
        results = store.read()
        speed = _speed(not no_run) if "table4" in request.sections else None
        report = write_report(grid, results, output, _command(), speed)
        failed = progress.failed if progress is not None else 0
        finished = sum(run.digest in results.finished for run in grid.runs(results, lambda digest: True))
        print_result(
            {
                "report": str(report.path),
                "files": list(report.files),
                "finished": finished,
                "failed": failed,
                "missing": list(plan.missing),
                "errors": list(report.errors),
            }
        )
        if not as_json:
            typer.echo(f"report in {report.path}")
        for error in report.errors:
            _say(error)
        if failed:
            _say(f"{failed} runs failed; the report says why, and the same command tries them again.")
        if failed or report.errors:
            raise typer.Exit(1)


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit()):
        raise MiLoraError(f"--shard takes I/N, such as 1/2; found {text!r}.")
    return int(index), int(count)


def _numbers(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() for part in parts):
        raise MiLoraError(f"{option} takes whole numbers with commas between, such as 0,1,2; found {text!r}.")
    return [int(part) for part in parts]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds >= HOUR:
        return f"{seconds / HOUR:.1f} hours"
    return f"{seconds / MINUTE:.0f} minutes" if seconds >= 2 * MINUTE else f"{seconds:.0f} seconds"


def _summary(plan: Plan) -> str:
    finished = sum(planned.state == "finished" for planned in plan.runs)
    left = len(plan.runs) - finished + len(plan.later)
    return (
        f"{finished} runs have finished, {left} are to be made: about {_duration(plan.seconds)} in one process "
        f"({plan.basis})."
    )


def _print_plan(plan: Plan) -> None:
    for planned in plan.runs:
        typer.echo(f"{planned.run.digest}  {planned.state:13}  {planned.seconds:6.0f} s  {planned.run.label}")
    for label in plan.later:
        typer.echo(f"{'(tuned first)':20}  {'open':13}  {'':8}  {label}")
    for line in plan.missing:
        typer.echo(f"cannot be run: {line}")
    typer.echo(_summary(plan))


def _command() -> str:
    """The command without what says where on a machine things are or how its work is shared."""
    kept: list[str] = []
    arguments: Sequence[str] = sys.argv[1:]
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in LEFT_OUT:
            skip = True
        elif argument not in ("--no-run", "--json") and argument.partition("=")[0] not in LEFT_OUT:
            kept.append(argument)
    return shlex.join(["milora", *kept])


def _speed(measure: bool) -> Any:
    from functools import partial

    from milora.paper.speed import speed_section

    return partial(speed_section, say=_say, measure=measure)
