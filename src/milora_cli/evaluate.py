"""`milora evaluate`: accuracy on tasks, as a table, and every prediction in a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from milora_cli import options
from milora_cli.output import json_only, print_table, progress_bar, quiet_libraries
from milora_core.errors import MiLoraError

if TYPE_CHECKING:
    from rich.table import Table

    from milora.tasks.task import Task

BUSY = "wait until it ends, or use another --output-dir"
INTERVAL = "95 % interval"


def command(
    task: Annotated[
        list[str],
        typer.Option("--task", metavar="NAME[,NAME...]", help="Tasks to evaluate on; can be repeated."),
    ],
    adapter: Annotated[
        str | None,
        typer.Option("--adapter", metavar="DIR", help="Folder or hub id of an adapter; by default the bare backbone."),
    ] = None,
    backbone: options.Backbone = None,
    data_dir: options.DataDirectory = None,
    split: Annotated[str, typer.Option("--split", help="train, dev or test.")] = "test",
    limit: options.Limit = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            min=0,
            max=options.LARGEST_SEED,
            help="Seed of sampling and of the row order, which decides the rows that --limit selects.",
        ),
    ] = 0,
    shots: Annotated[
        int | None,
        typer.Option(
            "--shots", min=0, help="Solved examples before each question, for mmlu (by default 5) and bbh (0)."
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output-dir",
            metavar="DIR",
            help="Folder for predictions, one file per task, and results.json. The same command resumes; another one "
            "adds tasks and figures. One process at a time.",
        ),
    ] = None,
    beams: Annotated[
        int | None,
        typer.Option(
            "--beams",
            min=1,
            help="Beams; by default 3, and for MT-Bench sampling at FastChat's temperatures.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Maximum length; by default each task's.")
    ] = None,
    batch_size: options.BatchSize = 8,
    perplexity: Annotated[
        bool, typer.Option("--perplexity", help="Also measure the perplexity of the gold completions.")
    ] = False,
    generate: Annotated[
        bool, typer.Option("--generate/--no-generate", help="Generate answers, or measure only perplexity.")
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
        typer.Option("--compare-with", metavar="FILE", help="Another model's mt-bench answers, for pairwise grades."),
    ] = None,
    model_id: Annotated[
        str | None, typer.Option("--model-id", help="Name in mt-bench's files; by default the adapter's folder.")
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Evaluate an adapter, or a bare backbone, on tasks.

    Answers are generated with beam search and read by each task's parser; an unreadable answer is wrong.
    """
    with json_only(as_json) as print_result:
        tasks = find_tasks(task, data_dir, shots)

        from milora.backbone.loading import backbone_of, load_for_inference, locate
        from milora.evaluation.fingerprint import model_fingerprint
        from milora.evaluation.measurement import EvaluationSettings, Judging, check_rows, evaluate
        from milora.evaluation.results import FILE_NAME, failures, merged, read_results, with_mean
        from milora.locks import writing_alone
        from milora.tasks.task import check_split
        from milora_core.files import write_json

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
        # An error in the last task's data should not appear after hours with the others.
        for of_task in tasks:
            check_rows(of_task, settings)
        adapters = {} if adapter is None else {"default": adapter}
        backbone = backbone_of(adapters, backbone)
        about = {"adapter": adapter, "backbone": locate(backbone), **settings.to_dict()}
        quiet_libraries()
        with nullcontext() if output_dir is None else writing_alone(output_dir, BUSY):
            if output_dir is not None:
                read_results(output_dir / FILE_NAME, about, tasks, settings.figures)
            model, tokenizer = load_for_inference(adapters, backbone, dtype=dtype, device=device)
            about["model"] = model_fingerprint(model)
            earlier = {}
            if output_dir is not None:
                earlier = read_results(output_dir / FILE_NAME, about, tasks, settings.figures)
            results: dict[str, dict[str, Any]] = {}
            for of_task in tasks:
                results[of_task.name] = evaluate(model, tokenizer, of_task, settings, _watch)
                if output_dir is not None:
                    write_json(output_dir / FILE_NAME, with_mean(about, merged(earlier, results)))
        result = with_mean(about, results)
        print_result(result)
        if not as_json:
            print_table(table(results, result["mean"], result["llm_adapters_mean"]))
            if output_dir is not None:
                typer.echo(f"predictions and {FILE_NAME} in {output_dir}", err=True)
        if lacking := failures(results):
            for line in lacking:
                typer.echo(f"milora: {line}", err=True)
            raise typer.Exit(1)


def find_tasks(names: Sequence[str], data_dir: Path | None, shots: int | None = None) -> list[Task]:
    """The tasks of the `--task` options, each with one or several names.

    Raises:
        MiLoraError: If a task does not exist, no task is named, or `shots` is given for a task without solved examples.
    """
    from milora.evaluation.results import shots_of
    from milora.tasks import registry

    separate = [name.strip() for listed in names for name in listed.split(",")]
    found = [registry.get(name, data_dir) for name in dict.fromkeys(separate) if name]
    if not found:
        raise MiLoraError(f"--task has no names; tasks: {', '.join(registry.names())}.")
    if shots is None:
        return found
    for of_task in found:
        if shots_of(of_task) is None:
            able = [name for name in registry.names() if shots_of(registry.get(name, data_dir)) is not None]
            raise MiLoraError(
                f"--shots is for {' and '.join(able)}: {of_task.name} has no solved examples; evaluate it separately."
            )
    return [registry.get(of_task.name, data_dir, shots=shots) for of_task in found]


def table(
    results: Mapping[str, Mapping[str, Any]], mean: float | None, llm_adapters_mean: float | None = None
) -> Table:
    """One row per task; columns without values are left out."""
    from rich.table import Table

    by_their_rule = [_share((result.get("llm_adapters") or {}).get("accuracy")) for result in results.values()]
    strict, theirs = "accuracy, strict" if any(by_their_rule) else "accuracy", "accuracy, LLM-Adapters' rule"
    columns = {
        "task": list(results),
        "rows": [_number(_rows(result)) for result in results.values()],
        strict: [_share(result.get("accuracy")) for result in results.values()],
        "score of 10": [_decimal(result.get("score")) for result in results.values()],
        "win rate": [_share(result.get("pairwise", {}).get("win_rate")) for result in results.values()],
        INTERVAL: [_interval(result.get("interval")) for result in results.values()],
        theirs: by_their_rule,
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
        footer = {"task": "mean", strict: _share(mean), theirs: _share(llm_adapters_mean)}.get(name, "")
        # The other headers may take two lines; their cells are single words.
        whole = name in ("task", INTERVAL)
        result.add_column(name, footer=footer, justify="left" if name == "task" else "right", no_wrap=whole)
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
