"""`milora bench`: how fast the methods are and what memory they take, measured side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from milora.cli import options
from milora.cli.output import json_only, quiet_libraries
from milora.errors import MiLoraError

if TYPE_CHECKING:
    from milora.benchmark import Result

app = typer.Typer(
    help="Measure speed and memory of the methods, side by side on one backbone with random weights.",
)

Backbone = Annotated[
    str | None,
    typer.Option(
        "--backbone",
        metavar="NAME",
        help="A shape such as llama-2-7b, 'tiny', or a folder's config; by default tinyllama-1.1b on a CPU and "
        "llama-2-7b on a GPU.",
    ),
]
Layers = Annotated[int | None, typer.Option("--layers", min=1, help="Transformer blocks, instead of the shape's own.")]
Methods = Annotated[
    str | None, typer.Option("--methods", metavar="A,B", help="Methods, with commas between, in the order of turns.")
]
Dtype = Annotated[str, typer.Option("--dtype", help="The backbone's: float32, bfloat16 or float16.")]
AdapterDtype = Annotated[
    str | None,
    typer.Option("--adapter-dtype", help="The adapters': the backbone's (default for inference), or float32."),
]
Attention = Annotated[
    str | None, typer.Option("--attention", help="transformers' attn_implementation, such as sdpa or eager.")
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Decode with a static cache and a compiled forward pass, for every method.")
]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Measurements of each method, in turn with the others.")]
RoundSeconds = Annotated[
    float, typer.Option("--round-seconds", help="Methods that would take longer for a run write fewer tokens in it.")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="torch's threads; its own choice by default.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the weights and the prompts.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Prompts a batch.")]
PromptTokens = Annotated[int, typer.Option("--prompt-tokens", min=1, help="Length of the prompts.")]
NewTokens = Annotated[int, typer.Option("--new-tokens", min=2, help="Tokens to generate, the first included.")]


Beams = Annotated[str, typer.Option("--beams", metavar="1,3", help="Widths of the search; 1 is greedy.")]


@app.command("decode")
def decode(
    backbone: Backbone = None,
    layers: Layers = None,
    methods: Methods = None,
    beams: Beams = "1,3",
    batch: Batch = 1,
    prompt_tokens: PromptTokens = 64,
    new_tokens: NewTokens = 32,
    rounds: Rounds = 5,
    round_seconds: RoundSeconds = 120.0,
    compiled: Compile = False,
    dtype: Dtype = "bfloat16",
    adapter_dtype: AdapterDtype = None,
    attention: Attention = None,
    device: options.Device = None,
    threads: Threads = None,
    seed: Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Tokens per second after the first one, and peak memory."""

    def measure() -> Result:
        from milora import benchmark

        settings = benchmark.DecodeSettings(
            backbone=backbone,
            layers=layers,
            beams=_numbers("--beams", beams),
            batch=batch,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            round_seconds=round_seconds,
            compile=compiled,
            dtype=dtype,
            adapter_dtype=adapter_dtype,
            attention=attention,
            device=device,
            seed=seed,
            methods=_named(methods).get("methods", benchmark.decode_methods(compiled)),
        )
        return benchmark.decode(settings, _tell)

    _run(measure, threads, as_json)


@app.command("prefill")
def prefill(
    backbone: Backbone = None,
    layers: Layers = None,
    methods: Methods = None,
    batch: Batch = 1,
    prompt_tokens: Annotated[
        str, typer.Option("--prompt-tokens", metavar="64,512", help="Lengths of the prompts.")
    ] = "64,512",
    rounds: Rounds = 5,
    dtype: Dtype = "bfloat16",
    adapter_dtype: AdapterDtype = None,
    attention: Attention = None,
    device: options.Device = None,
    threads: Threads = None,
    seed: Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Time to the first token, and the share of it that is pooling and routing."""

    def measure() -> Result:
        from milora import benchmark

        settings = benchmark.PrefillSettings(
            backbone=backbone,
            layers=layers,
            batch=batch,
            prompt_tokens=_numbers("--prompt-tokens", prompt_tokens),
            rounds=rounds,
            dtype=dtype,
            adapter_dtype=adapter_dtype,
            attention=attention,
            device=device,
            seed=seed,
            **_named(methods),
        )
        return benchmark.prefill(settings, _tell)

    _run(measure, threads, as_json)


@app.command("train")
def train(
    backbone: Backbone = None,
    layers: Layers = None,
    methods: Methods = None,
    batch: Batch = 8,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Of each row; the first half has no loss.")] = 256,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Run blocks a second time in the backward pass.")
    ] = False,
    rounds: Rounds = 5,
    dtype: Dtype = "bfloat16",
    adapter_dtype: Annotated[
        str | None,
        typer.Option("--adapter-dtype", help="The adapters': float32 (default for training), or the backbone's."),
    ] = None,
    attention: Attention = None,
    device: options.Device = None,
    threads: Threads = None,
    seed: Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Time and peak memory of a training step: forward, backward, AdamW."""

    def measure() -> Result:
        from milora import benchmark

        settings = benchmark.TrainSettings(
            backbone=backbone,
            layers=layers,
            batch=batch,
            tokens=tokens,
            gradient_checkpointing=gradient_checkpointing,
            rounds=rounds,
            dtype=dtype,
            adapter_dtype=adapter_dtype,
            attention=attention,
            device=device,
            seed=seed,
            **_named(methods),
        )
        return benchmark.train_steps(settings, _tell)

    _run(measure, threads, as_json)


@app.command("tenants")
def tenants(
    backbone: Backbone = None,
    layers: Layers = None,
    methods: Methods = None,
    number: Annotated[
        str, typer.Option("--tenants", metavar="16", help="Numbers of adapters that share a batch.")
    ] = "16",
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Rows; by default as many as there are tenants.")
    ] = None,
    beams: Beams = "1",
    prompt_tokens: PromptTokens = 64,
    new_tokens: NewTokens = 16,
    rounds: Rounds = 5,
    round_seconds: RoundSeconds = 120.0,
    compiled: Compile = False,
    dtype: Dtype = "bfloat16",
    adapter_dtype: AdapterDtype = None,
    attention: Attention = None,
    device: options.Device = None,
    threads: Threads = None,
    seed: Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Decoding of batches in which each row has another adapter."""

    def measure() -> Result:
        from milora import benchmark

        settings = benchmark.TenantsSettings(
            backbone=backbone,
            layers=layers,
            tenants=_numbers("--tenants", number),
            batch=batch,
            beams=_numbers("--beams", beams),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            round_seconds=round_seconds,
            compile=compiled,
            dtype=dtype,
            adapter_dtype=adapter_dtype,
            attention=attention,
            device=device,
            seed=seed,
            **_named(methods),
        )
        return benchmark.tenants(settings, _tell)

    _run(measure, threads, as_json)


@app.command("kernel")
def kernel(
    batches: Annotated[
        str, typer.Option("--batches", metavar="1,8,32,64", help="Numbers of rows, each with an adapter of its own.")
    ] = "1,8,32,64",
    d_in: Annotated[int, typer.Option("--d-in", min=1, help="Size of the module's input.")] = 4096,
    d_out: Annotated[int, typer.Option("--d-out", min=1, help="Size of the module's output.")] = 4096,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Of the adapters.")] = 32,
    active: Annotated[int, typer.Option("--active", min=1, help="Every how-manyth row chose the module.")] = 2,
    rounds: Rounds = 5,
    dtype: Dtype = "bfloat16",
    device: options.Device = None,
    threads: Threads = None,
    seed: Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """The operator for rows with different adapters, against its reference and the device's bandwidth."""

    def measure() -> Result:
        from milora import benchmark

        settings = benchmark.KernelSettings(
            batches=_numbers("--batches", batches),
            d_in=d_in,
            d_out=d_out,
            rank=rank,
            active=active,
            rounds=rounds,
            dtype=dtype,
            device=device,
            seed=seed,
        )
        return benchmark.kernel(settings, _tell)

    _run(measure, threads, as_json)


@app.command("traffic")
def traffic(
    backbone: Annotated[
        str,
        typer.Option("--backbone", metavar="NAME", help="A shape such as llama-2-7b, 'tiny', or a folder's config."),
    ] = "tinyllama-1.1b",
    layers: Layers = None,
    methods: Methods = None,
    batch: Batch = 1,
    beams: Annotated[int, typer.Option("--beams", min=1, help="Width of the search.")] = 1,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens whose keys and values are read.")] = 96,
    dtype: Dtype = "bfloat16",
    adapter_dtype: AdapterDtype = None,
    as_json: options.AsJson = False,
) -> None:
    """Bytes and operations that a decode step needs, by formula; nothing is measured."""

    def compute() -> Result:
        from milora import benchmark

        settings = benchmark.TrafficSettings(
            backbone=backbone,
            layers=layers,
            batch=batch,
            beams=beams,
            context=context,
            dtype=dtype,
            adapter_dtype=adapter_dtype,
            device="cpu",
            **_named(methods),
        )
        return benchmark.traffic(settings)

    _run(compute, None, as_json)


@app.command("markdown")
def markdown(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="What --json printed, a file each.")],
) -> None:
    """Print results that were kept as JSON as Markdown tables."""
    from milora.benchmark.tables import markdown as as_markdown

    for path in files:
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            text = as_markdown(result)
        except (ValueError, KeyError, TypeError) as error:
            raise MiLoraError(
                f"{path} is no result of milora bench --json ({type(error).__name__}: {error})."
            ) from error
        typer.echo(text)


def _run(measure: Callable[[], Result], threads: int | None, as_json: bool) -> None:
    with json_only(as_json) as print_result:
        import torch

        from milora.benchmark.tables import print_table

        quiet_libraries()
        if threads is not None:
            torch.set_num_threads(threads)
        result = measure().to_dict()
        print_result(result)
        if not as_json:
            print_table(result)


def _tell(line: str) -> None:
    print(f"milora bench: {line}", file=sys.stderr, flush=True)


def _named(methods: str | None) -> dict[str, Any]:
    """`methods=`, where some are named; otherwise each benchmark has its own."""
    if methods is None:
        return {}
    return {"methods": tuple(name.strip() for name in methods.split(",") if name.strip())}


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise MiLoraError(f"{option} takes whole numbers with commas between, such as 1,3; found {text!r}.") from error
    if not found:
        raise MiLoraError(f"{option} names no number; give some, such as 1,3.")
    return found
