"""`milora bench serve`: load tests of OpenAI-compatible servers."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from milora_cli import options
from milora_cli.output import json_only, print_table, progress_bar, reserved
from milora_core.errors import MiLoraError, importing

if TYPE_CHECKING:
    from rich.table import Table

NOTHING = "-"


def command(
    endpoint: Annotated[
        list[str],
        typer.Option(
            "--endpoint",
            metavar="[NAME=]URL[#MODEL,MODEL]",
            help="A server, and which of its models; by default all that it lists. Repeat to compare servers in turn.",
        ),
    ],
    keys: Annotated[
        Path | None,
        typer.Option("--keys", metavar="FILE", help="API keys by model, in YAML; others take OPENAI_API_KEY."),
    ] = None,
    requests: Annotated[int, typer.Option("--requests", min=1, help="Requests per round.")] = 100,
    rate: Annotated[
        float,
        typer.Option(
            "--rate",
            min=0,
            callback=options.not_nan,
            help="Requests per second, Poisson arrivals; 0 or inf sends all at once.",
        ),
    ] = 0.0,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", min=1, help="The most requests at a time.")
    ] = None,
    prompt_words: Annotated[
        str, typer.Option("--prompt-words", metavar="16-48", help="Shortest and longest prompt, in words.")
    ] = "16-48",
    shared_words: Annotated[
        int, typer.Option("--shared-words", min=0, help="Words that all prompts begin with, for prefix caches.")
    ] = 0,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="The most new tokens.")] = 32,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Generate all new tokens; milora and vLLM know this option.")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Use /v1/chat/completions.")] = False,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, callback=options.finite, help="0 is greedy.")
    ] = 0.0,
    body: Annotated[
        str | None, typer.Option("--body", metavar="JSON", help="More fields of the requests, as a JSON object.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Turns of each server.")] = 1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of arrivals, models, prompts.")] = 0,
    timeout: Annotated[
        float, typer.Option("--timeout", min=1, callback=options.finite, help="Timeout of a request in seconds.")
    ] = 600.0,
    output: Annotated[
        list[Path] | None,
        typer.Option("--output", metavar="FILE", help="File: a picture (.png, .svg, .pdf) or all values (.json)."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Load test of servers: time to first token, time between tokens, throughput, fairness between tenants.

    Any server with OpenAI's API can be measured. Exit status 1 if a request failed.
    """
    paths = output or []
    for path in paths:
        if path.suffix.lower() not in (".json", ".png", ".svg", ".pdf"):
            raise MiLoraError(f"--output {path}: the name must end in .json, .png, .svg or .pdf.")
    with json_only(as_json) as print_json, ExitStack() as outputs:
        with importing("serve", "milora bench serve"):
            from milora.benchmark.serve import Endpoint, ServeSettings, serve_load
        from milora_core.files import write_json

        outputs.enter_context(reserved(paths, "load.json"))
        settings = ServeSettings(
            endpoints=tuple(Endpoint.parse(text) for text in endpoint),
            keys=_keys(keys),
            key=os.environ.get("OPENAI_API_KEY") or None,
            requests=requests,
            # As in vLLM's load generator. JSON has no infinity.
            rate=0.0 if math.isinf(rate) else rate,
            concurrency=concurrency,
            prompt_words=_range(prompt_words),
            shared_words=shared_words,
            new_tokens=new_tokens,
            ignore_eos=ignore_eos,
            chat=chat,
            temperature=temperature,
            rounds=rounds,
            seed=seed,
            timeout=timeout,
            body=_object(body),
        )
        with progress_bar() as progress:
            task = progress.add_task("requests", total=requests * rounds * len(endpoint))
            result = serve_load(settings, _tell, lambda _: progress.advance(task))
        for path in paths:
            if path.suffix.lower() == ".json":
                write_json(path, result)
            else:
                from milora.benchmark.serve_picture import draw_load

                draw_load(result, path)
        print_json({name: value for name, value in result.items() if name != "answers"})
        if not as_json:
            print_table(_table(result))
    failed = sum(row["failed"] for row in result["rows"])
    if failed:
        reasons = {reason for row in result["rows"] for reason in row["errors"]}
        print(f"milora bench: {failed} requests failed: {'; '.join(sorted(reasons)[:3])}", file=sys.stderr)
        raise typer.Exit(1)


def _table(result: Mapping[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title="seconds are medians over the rounds")
    for name in ("endpoint", "tokens/s", "/ first", "first token p50", "p99", "between tokens p50", "p99", "fairness"):
        table.add_column(name, justify="left" if name == "endpoint" else "right", no_wrap=True)
    for name, of_one in result["medians"].items():
        jain = [row["fairness"]["jain"] for row in result["rows"] if row["endpoint"] == name]
        numbers = [
            of_one["tokens_per_second"],
            of_one["ratio_to_first"],
            of_one["first_token_p50"],
            of_one["first_token_p99"],
            of_one["between_tokens_p50"],
            of_one["between_tokens_p99"],
            min((each for each in jain if each is not None), default=None),
        ]
        table.add_row(name, *(NOTHING if number is None else f"{number:.3f}" for number in numbers))
    return table


def _keys(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MiLoraError(f"--keys {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found.values()):
        raise MiLoraError(f"--keys {path} must map models to their API keys, a line `MODEL: KEY` each.")
    return {str(model): key for model, key in found.items()}


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    try:
        return int(low), int(high or low)
    except ValueError as error:
        raise MiLoraError(f"--prompt-words takes a range such as 16-48; found {text!r}.") from error


def _object(text: str | None) -> dict[str, Any]:
    try:
        found = {} if text is None else json.loads(text)
    except ValueError as error:
        raise MiLoraError(f"--body is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise MiLoraError(f"--body takes a JSON object; found {text}.")
    return found


def _tell(line: str) -> None:
    print(f"milora bench: {line}", file=sys.stderr, flush=True)
