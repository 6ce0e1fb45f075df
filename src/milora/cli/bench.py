"""`milora bench`: how fast the methods are and what memory they take, measured side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

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


@app.command("decode")
def decode(
    backbone: Backbone = None,
    layers: Layers = None,
    methods: Methods = None,
    beams: Annotated[str, typer.Option("--beams", metavar="1,3", help="Widths of the search; 1 is greedy.")] = "1,3",
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

    def measure(progress: Callable[[str], None]) -> Result:
        from milora.benchmark import DecodeSettings
        from milora.benchmark import decode as measured
        from milora.benchmark.decode import DECODE_METHODS

        settings = DecodeSettings(
            backbone=backbone,
            layers=layers,
            methods=_names(methods, DECODE_METHODS),
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
        )
        return measured(settings, progress)

    _run(measure, threads, as_json)


def _run(measure: Callable[[Callable[[str], None]], Result], threads: int | None, as_json: bool) -> None:
    with json_only(as_json) as print_result:
        import torch

        from milora.benchmark.tables import print_table

        quiet_libraries()
        if threads is not None:
            torch.set_num_threads(threads)
        result = measure(_tell)
        print_result(result.to_dict())
        if not as_json:
            print_table(result.to_dict())


def _tell(line: str) -> None:
    print(f"milora bench: {line}", file=sys.stderr, flush=True)


def _names(text: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    return default if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise MiLoraError(f"{option} takes whole numbers with commas between, such as 1,3; found {text!r}.") from error
    if not found:
        raise MiLoraError(f"{option} names no number; give some, such as 1,3.")
    return found
