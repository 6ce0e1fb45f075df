"""`milora evaluate`: accuracy on tasks, as a table, and every prediction in a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from milora.cli import options
from milora.cli.output import json_only, progress_bar, quiet_libraries
from milora.errors import MiLoraError

if TYPE_CHECKING:
    from rich.table import Table

    from milora.tasks.task import Task

RESULTS_FILE = "results.json"
BUSY = "wait until it has ended, or give another --output-dir"


def command(
    task: Annotated[
        list[str],
        typer.Option("--task", metavar="NAME[,NAME...]", help="Tasks to evaluate on; can be repeated."),
    ],
    adapter: Annotated[
        str | None,
        typer.Option("--adapter", metavar="DIR", help="Folder or hub id of an adapter; without, the bare backbone."),
    ] = None,
    backbone: options.Backbone = None,
    data_dir: options.DataDirectory = None,
    split: Annotated[str, typer.Option("--split", help="train, dev or test.")] = "test",
    limit: options.Limit = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the rows' order, and so of what --limit takes.")] = 0,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output-dir",
            metavar="DIR",
            help=f"Predictions, a file a task, and {RESULTS_FILE}, to which other tasks can be added; the same command "
            "goes on with what is there. One process at a time.",
        ),
    ] = None,
    beams: Annotated[
        int | None,
        typer.Option("--beams", min=1, help="Beams; 3, as in the paper, and for MT-Bench FastChat's temperatures."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="By default what each task needs.")
    ] = None,
    batch_size: options.BatchSize = 8,
    perplexity: Annotated[bool, typer.Option("--perplexity", help="Measure the gold completions' too.")] = False,
    generate: Annotated[
        bool, typer.Option("--generate/--no-generate", help="Whether to generate answers, or measure perplexity alone.")
    ] = True,
    judge_url: Annotated[
        str | None,
        typer.Option(
            "--judge-url",
            metavar="URL",
            help="OpenAI-compatible API that judges mt-bench; its key is MILORA_JUDGE_API_KEY or OPENAI_API_KEY.",
        ),
    ] = None,
    judge_model: Annotated[str, typer.Option("--judge-model", help="The judge's name there.")] = "gpt-4",
    judge_workers: Annotated[int, typer.Option("--judge-workers", min=1, help="Requests at a time.")] = 4,
    compare_with: Annotated[
        Path | None,
        typer.Option("--compare-with", metavar="FILE", help="Another model's mt-bench answers, for pairwise judging."),
    ] = None,
    model_id: Annotated[
        str | None, typer.Option("--model-id", help="Name in mt-bench's files; by default the adapter's folder.")
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Evaluate an adapter, or a bare backbone, on tasks.

    Answers are generated with beam search and read as each task reads them; one that cannot be read is wrong.
    """
    with json_only(as_json) as print_result:
        tasks = find_tasks(task, data_dir)

        from milora.backbone.loading import backbone_of, load_for_inference, locate
        from milora.evaluation.fingerprint import model_fingerprint
        from milora.evaluation.run import EvaluationSettings, Judging, check_rows, evaluate, mean_accuracy
        from milora.files import write_json
        from milora.locks import alone_in
        from milora.tasks.task import check_split

        settings = EvaluationSettings(
            split=check_split("milora evaluate", split),
            limit=limit,
            seed=seed,
            beams=beams,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            accuracy=generate,
            perplexity=perplexity,
            output_dir=output_dir,
            judging=Judging(
                model_id=model_id or Path(adapter or backbone or "model").resolve().name,
                url=judge_url,
                model=judge_model,
                opponent=compare_with,
                workers=judge_workers,
            ),
        )
        # A mistake in the last task's data should not show after hours with the others.
        for of_task in tasks:
            check_rows(of_task, settings)
        adapters = {} if adapter is None else {"default": adapter}
        backbone = backbone_of(adapters, backbone)
        about = {"adapter": adapter, "backbone": locate(backbone), **settings.to_dict()}
        names = [of_task.name for of_task in tasks]
        quiet_libraries()
        with nullcontext() if output_dir is None else alone_in(output_dir, BUSY):
            if output_dir is not None:
                earlier_results(output_dir / RESULTS_FILE, about, names)
            model, tokenizer = load_for_inference(adapters, backbone, dtype=dtype, device=device)
            about["model"] = model_fingerprint(model)
            earlier = {} if output_dir is None else earlier_results(output_dir / RESULTS_FILE, about, names)
            results: dict[str, dict[str, Any]] = {}
            for of_task in tasks:
                results[of_task.name] = evaluate(model, tokenizer, of_task, settings, _watch)
                result = {**about, "tasks": results, "mean": mean_accuracy(results)}
                if output_dir is not None:
                    together = {**earlier, **results}
                    write_json(output_dir / RESULTS_FILE, {**about, "tasks": together, "mean": mean_accuracy(together)})
        print_result(result)
        if not as_json:
            from rich.console import Console

            console = Console()
            if not console.is_terminal:
                # A file has no width to fit, and narrow columns would cut names.
                console.width = 160
            console.print(table(results, result["mean"]))
            for result in results.values():
                if result.get("failed"):
                    typer.echo(f"{result['failed']} judgements could not be had: {result['reason']}", err=True)
            if output_dir is not None:
                typer.echo(f"predictions and {RESULTS_FILE} in {output_dir}", err=True)


def earlier_results(path: Path, about: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The results by task that a file has from earlier calls, to which others are added.

    With another `limit` it is begun anew, if each of its tasks is measured again.

    Args:
        path: The file; without one there are no results.
        about: What the results depend on, as far as it is known yet.
        tasks: What is to be measured now.

    Raises:
        MiLoraError: If it is of another model or other settings, or it is no file of results.
    """
    elsewhere = "give another --output-dir, or remove the file"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        earlier: dict[str, dict[str, Any]] = dict(found["tasks"])
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise MiLoraError(f"{path} is no file of results of milora evaluate: {elsewhere}.") from error
    different = [name for name, value in about.items() if found.get(name) != value]
    if different == ["limit"] and set(earlier) <= set(tasks):
        return {}
    if different:
        name = different[0]
        raise MiLoraError(
            f"{path} has results with another {name} ({found.get(name)!r}, and now {about[name]!r}): {elsewhere}."
        )
    return earlier


def find_tasks(names: Sequence[str], data_dir: Path | None) -> list[Task]:
    """The tasks of `--task` options, each of one name or of several between commas.

    Raises:
        MiLoraError: If there is no task of a name, or none at all.
    """
    from milora.tasks import registry

    separate = [name.strip() for listed in names for name in listed.split(",")]
    found = [registry.get(name, data_dir) for name in dict.fromkeys(separate) if name]
    if not found:
        raise MiLoraError(f"--task names no task; there are {', '.join(registry.names())}.")
    return found


def table(results: Mapping[str, Mapping[str, Any]], mean: float | None) -> Table:
    """A row a task; columns that say nothing of any task are left out."""
    from rich.table import Table

    columns = {
        "task": list(results),
        "rows": [_number(_rows(result)) for result in results.values()],
        "accuracy": [_share(result.get("accuracy")) for result in results.values()],
        "score of 10": [_decimal(result.get("score")) for result in results.values()],
        "win rate": [_share(result.get("pairwise", {}).get("win_rate")) for result in results.values()],
        "95 % interval": [_interval(result.get("interval")) for result in results.values()],
        "groups": [_number(len(result.get("groups", ())) or None) for result in results.values()],
        "unparsed": [_number(result.get("unparsed")) for result in results.values()],
        "no room": [
            _number(result.get("no_room", 0) + result.get("perplexity_no_room", 0) or None)
            for result in results.values()
        ],
        "perplexity": [_decimal(result.get("perplexity")) for result in results.values()],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    result = Table(show_footer=mean is not None and len(results) > 1)
    for name in shown:
        footer = "mean" if name == "task" else _share(mean) if name == "accuracy" else ""
        result.add_column(name, footer=footer, justify="left" if name == "task" else "right", no_wrap=True)
    for cells in zip(*shown.values(), strict=True):
        result.add_row(*cells)
    return result


def _rows(result: Mapping[str, Any]) -> int | None:
    return next((result[name] for name in ("rows", "perplexity_rows", "questions") if name in result), None)


def _watch(items: Iterable[Any], what: str, count: int) -> Iterable[Any]:
    with progress_bar() as progress:
        yield from progress.track(items, total=count, description=what)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _interval(value: Sequence[float] | None) -> str:
    return "" if value is None else f"{value[0]:.1%} - {value[1]:.1%}"


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
