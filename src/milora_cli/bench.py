"""`milora bench`: speed and memory of the methods, measured side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from milora_cli import bench_serve, options
from milora_cli.bench_options import (
    Batch,
    Dtype,
    Generation,
    Measurement,
    RunningModels,
    Shapes,
    TenantsGeneration,
    numbers,
)
from milora_cli.groups import with_groups
from milora_cli.output import json_only, quiet_libraries
from milora_core.errors import MiLoraError

if TYPE_CHECKING:
    from milora.benchmark import Result

app = typer.Typer(
    help="Measure speed and memory of the methods, side by side on one backbone with random weights.",
)


@app.command("decode")
@with_groups
def decode(*, models: RunningModels, batch: Batch = 1, generation: Generation, measurement: Measurement) -> None:
    """Tokens per second after the first one, and peak memory."""
    with _printing(measurement.as_json, measurement.threads) as print_result:
        from milora import benchmark

        named = {"methods": benchmark.decode_methods(generation.compile), **models.settings()}
        settings = benchmark.DecodeSettings(batch=batch, **named, **generation.settings(), **measurement.settings())
        print_result(benchmark.decode(settings, _tell))


@app.command("prefill")
@with_groups
def prefill(
    *,
    models: RunningModels,
    batch: Batch = 1,
    prompt_tokens: Annotated[
        str, typer.Option("--prompt-tokens", metavar="64,512", help="Lengths of the prompts.")
    ] = "64,512",
    measurement: Measurement,
) -> None:
    """Time to the first token, and the share of it that is pooling and routing."""
    with _printing(measurement.as_json, measurement.threads) as print_result:
        from milora import benchmark

        lengths = numbers("--prompt-tokens", prompt_tokens)
        settings = benchmark.PrefillSettings(
            batch=batch, prompt_tokens=lengths, **models.settings(), **measurement.settings()
        )
        print_result(benchmark.prefill(settings, _tell))


@app.command("train")
@with_groups
def train(
    *,
    models: RunningModels,
    batch: Batch = 8,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens per row; the first half has no loss.")] = 256,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute blocks in the backward pass.")
    ] = False,
    measurement: Measurement,
) -> None:
    """Time and peak memory of a training step: forward, backward, AdamW."""
    with _printing(measurement.as_json, measurement.threads) as print_result:
        from milora import benchmark

        settings = benchmark.TrainSettings(
            batch=batch,
            tokens=tokens,
            gradient_checkpointing=gradient_checkpointing,
            **models.settings(),
            **measurement.settings(),
        )
        print_result(benchmark.train_steps(settings, _tell))


@app.command("tenants")
@with_groups
def tenants(
    *,
    models: RunningModels,
    number: Annotated[
        str, typer.Option("--tenants", metavar="16", help="Numbers of adapters that share a batch.")
    ] = "16",
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Rows; by default one per tenant.")] = None,
    generation: TenantsGeneration,
    measurement: Measurement,
) -> None:
    """Decoding of batches in which each row has another adapter."""
    with _printing(measurement.as_json, measurement.threads) as print_result:
        from milora import benchmark

        settings = benchmark.TenantsSettings(
            tenants=numbers("--tenants", number),
            batch=batch,
            **models.settings(),
            **generation.settings(),
            **measurement.settings(),
        )
        print_result(benchmark.tenants(settings, _tell))


@app.command("kernel")
@with_groups
def kernel(
    *,
    batches: Annotated[
        str, typer.Option("--batches", metavar="1,8,32,64", help="Numbers of rows, each with its own adapter.")
    ] = "1,8,32,64",
    d_in: Annotated[int, typer.Option("--d-in", min=1, help="Size of the module's input.")] = 4096,
    d_out: Annotated[int, typer.Option("--d-out", min=1, help="Size of the module's output.")] = 4096,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Rank of the adapters.")] = 32,
    active: Annotated[int, typer.Option("--active", min=1, help="One row in N selects the module.")] = 2,
    dtype: Dtype = "bfloat16",
    measurement: Measurement,
) -> None:
    """The operator for rows with different adapters, against its reference and the device's bandwidth."""
    with _printing(measurement.as_json, measurement.threads) as print_result:
        from milora import benchmark

        settings = benchmark.KernelSettings(
            batches=numbers("--batches", batches),
            d_in=d_in,
            d_out=d_out,
            rank=rank,
            active=active,
            dtype=dtype,
            **measurement.settings(),
        )
        print_result(benchmark.kernel(settings, _tell))


@app.command("traffic")
@with_groups
def traffic(
    *,
    models: Shapes,
    batch: Batch = 1,
    beams: Annotated[int, typer.Option("--beams", min=1, help="Width of the search.")] = 1,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens whose keys and values are read.")] = 96,
    as_json: options.AsJson = False,
) -> None:
    """Bytes and operations of a decode step, by formula; nothing is measured."""
    with _printing(as_json) as print_result:
        from milora import benchmark

        settings = benchmark.TrafficSettings(
            batch=batch, beams=beams, context=context, device="cpu", **models.settings()
        )
        print_result(benchmark.traffic(settings))


app.command("serve")(bench_serve.command)


@app.command("markdown")
def markdown(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files with the output of --json.")],
) -> None:
    """Print saved JSON results as Markdown tables."""
    from milora.benchmark.tables import markdown as as_markdown

    for path in files:
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            text = as_markdown(result)
        except (ValueError, KeyError, TypeError) as error:
            raise MiLoraError(
                f"{path} is not a result of milora bench --json ({type(error).__name__}: {error})."
            ) from error
        typer.echo(text)


@contextmanager
def _printing(as_json: bool, threads: int | None = None) -> Iterator[Callable[[Result], None]]:
    """Yields a function that prints the result as a table or JSON; nothing else is written to standard output."""
    with json_only(as_json) as print_json:
        import torch

        from milora.benchmark.tables import print_table

        quiet_libraries()
        if threads is not None:
            torch.set_num_threads(threads)

        def print_result(result: Result) -> None:
            found = result.to_dict()
            print_json(found)
            if not as_json:
                print_table(found)

        yield print_result


def _tell(line: str) -> None:
    print(f"milora bench: {line}", file=sys.stderr, flush=True)
