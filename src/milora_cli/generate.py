"""`milora generate`: texts for prompts, and the accuracy if the answers are known."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from milora_cli import options
from milora_cli.output import json_only, progress_bar, quiet_libraries, reserved
from milora_cli.prompts import read_requests
from milora_core.errors import MiLoraError

if TYPE_CHECKING:
    from milora.evaluation.predictions import Request
    from milora.inference.generation import Decoding
    from milora.tasks.task import Task

DEFAULT_ADAPTER = "default"


def command(
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="[NAME=]DIR", help="Adapter; repeat as NAME=DIR if rows name their adapter."),
    ] = None,
    backbone: options.Backbone = None,
    prompt: options.Prompts = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="SOURCE",
            help="A task, a .jsonl or .json file, - (JSON lines on standard input), a folder or a hub dataset "
            "(owner/name or owner/name:configuration).",
        ),
    ] = None,
    split: options.Split = "test",
    data_dir: options.DataDirectory = None,
    task: Annotated[
        str | None,
        typer.Option("--task", help="Read answers with this task's parser; by default the task of --data."),
    ] = None,
    limit: options.Limit = None,
    beams: Annotated[
        int | None,
        typer.Option("--beams", min=1, help="Beams; 3 by default, as in the paper, and 1 when sampling."),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", min=1, help="Maximum length; by default the task's, else 128."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="Sample at this temperature."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", help="Sample from the tokens that make up this probability."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=options.LARGEST_SEED, help="Seed of sampling.")] = 0,
    batch_size: options.BatchSize = 8,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE.jsonl", help="Append one row per prompt; existing rows are kept."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Generate texts with an adapter.

    Prompts come from --prompt, --data, or standard input (a line each). Without --output the texts are printed.
    """
    with json_only(as_json) as print_result, ExitStack() as outputs:
        adapters = parse_adapters(adapter or [])
        requests = read_requests(prompt or [], data, split=split, data_dir=data_dir, limit=limit)
        names = adapter_of_each(requests, adapters)
        judge_task = _task(task, data, data_dir)

        from transformers import set_seed

        from milora.backbone.loading import load_for_inference
        from milora.evaluation.predictions import Predictions
        from milora.evaluation.scores import score
        from milora.inference.generation import Decoding, generate_texts

        sampling = temperature is not None or top_p is not None
        decoding = Decoding(
            max_new_tokens=max_new_tokens or (judge_task.max_new_tokens if judge_task else 128),
            beams=beams or (1 if sampling else 3),
            temperature=temperature,
            top_p=top_p,
        )
        quiet_libraries()
        outputs.enter_context(reserved([output] if output else [], "texts.jsonl"))
        # With several adapters, rows name theirs.
        named = [
            replace(request, adapter=None if name in ("", DEFAULT_ADAPTER) else name)
            for request, name in zip(requests, names, strict=True)
        ]
        # The weights identify the run, because they may have changed under the same names.
        model, tokenizer = load_for_inference(adapters, backbone, dtype=dtype, device=device)
        run = "" if output is None else _run(model, list(adapters), decoding, seed)
        predictions = Predictions(named, judge_task, output, run)
        missing = predictions.missing()
        seconds, tokens = 0.0, 0
        if missing:
            set_seed(seed)
            started = time.perf_counter()
            texts = generate_texts(
                model,
                tokenizer,
                [requests[index].prompt for index in missing],
                decoding,
                batch_size=batch_size,
                adapters=[names[index] for index in missing] if len(adapters) > 1 else None,
            )
            with progress_bar() as progress:
                for text in progress.track(texts, total=len(missing), description="generating"):
                    predictions.add(missing[text.index], text)
                    tokens += text.tokens
            seconds = time.perf_counter() - started
        of_all = score(predictions.records()).whole
        summary = {
            "rows": len(requests),
            "accuracy": of_all.accuracy,
            "unparsed": of_all.unparsed if of_all.rows else None,
            "output": str(output) if output else None,
            "generated": len(missing),
            "seconds": round(seconds, 3),
            "tokens_per_second": round(tokens / seconds, 2) if seconds else None,
        }
        print_result(summary if output else {**summary, "texts": predictions.records()})
        if not as_json:
            _print(predictions.records(), summary)


def parse_adapters(values: Sequence[str]) -> dict[str, str]:
    """`--adapter` options by name: a single `DIR` is the default adapter, several are `NAME=DIR`.

    Raises:
        MiLoraError: If one of several has no name, or two have the same name.
    """
    adapters: dict[str, str] = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not separator or Path(value).exists():
            if len(values) > 1:
                raise MiLoraError(
                    f"--adapter {value}: with several adapters each needs a name: --adapter NAME={value}."
                )
            name, path = DEFAULT_ADAPTER, value
        if not name or not path:
            raise MiLoraError(f"--adapter {value}: give it as DIR or NAME=DIR.")
        if name in adapters:
            raise MiLoraError(f"--adapter {value}: the name {name!r} is already used for {adapters[name]}.")
        adapters[name] = path
    return adapters


def adapter_of_each(requests: Sequence[Request], adapters: Mapping[str, str]) -> list[str]:
    """The adapter of each request: the one it names, or the only one (an empty name if there are no adapters).

    Raises:
        MiLoraError: If a request names an unknown adapter, or names none and there are several.
    """
    only = next(iter(adapters), "") if len(adapters) < 2 else None
    names = []
    for number, request in enumerate(requests, start=1):
        # A single unnamed adapter serves all rows, even if they name adapters: the file may be for several.
        name = only if only in ("", DEFAULT_ADAPTER) else request.adapter or only
        if name is None:
            raise MiLoraError(
                f"Prompt {number} names no adapter, and there are {', '.join(adapters)}: give rows a field `adapter`."
            )
        if name not in adapters and name != only:
            raise MiLoraError(f"Prompt {number} is for the adapter {name!r}; there are {', '.join(adapters)}.")
        names.append(name)
    return names


def _task(name: str | None, data: str | None, data_dir: Path | None) -> Task | None:
    if name is None and data is None:
        return None
    from milora.tasks import registry

    if name is not None:
        return registry.get(name, data_dir)
    return registry.get(str(data), data_dir) if data in registry.names() else None


def _run(model: Any, adapters: Sequence[str], decoding: Decoding, seed: int) -> str:
    """A digest of what determines the texts besides the prompts: weights, dtype, adapters, decoding."""
    from milora.evaluation.fingerprint import model_fingerprint, run_fingerprint

    settings = {
        "adapters": adapters,
        "decoding": asdict(decoding),
        "dtype": str(model.dtype),
        "seed": seed if decoding.samples else None,
    }
    return run_fingerprint(settings, model_fingerprint(model, adapters))


def _print(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    if summary["output"] is None:
        for row in rows:
            typer.echo(row["output"].strip())
    if summary["accuracy"] is not None:
        typer.echo(
            f"accuracy {summary['accuracy']:.1%} of {summary['rows']} rows, {summary['unparsed']} without an answer",
            err=True,
        )
    if summary["output"] is not None:
        typer.echo(f"{summary['rows']} rows in {summary['output']}, {summary['generated']} of them new", err=True)
