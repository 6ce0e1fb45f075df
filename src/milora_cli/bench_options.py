"""Options of the sub-commands of `milora bench`, each defined once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from milora_cli import options
from milora_core.errors import MiLoraError

Dtype = Annotated[str, typer.Option("--dtype", help="Dtype of the backbone: float32, bfloat16 or float16.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Prompts per batch.")]
Beams = Annotated[str, typer.Option("--beams", metavar="1,3", help="Widths of the search; 1 is greedy.")]
NewTokens = Annotated[int, typer.Option("--new-tokens", min=2, help="Tokens to generate, including the first.")]


@dataclass(frozen=True)
class Models:
    """The backbone, and the methods around it."""

    backbone: Annotated[
        str | None,
        typer.Option(
            "--backbone",
            metavar="NAME",
            help="A shape such as llama-2-7b, 'tiny', or a folder's config; by default tinyllama-1.1b on a CPU and "
            "llama-2-7b on a GPU.",
        ),
    ] = None
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Number of Transformer blocks; by default the shape's.")
    ] = None
    methods: Annotated[
        str | None,
        typer.Option("--methods", metavar="A,B", help="Methods, separated by commas, in measuring order."),
    ] = None
    dtype: Dtype = "bfloat16"
    adapter_dtype: Annotated[
        str | None,
        typer.Option(
            "--adapter-dtype",
            help="Dtype of the adapters: the backbone's (default for inference) or float32 (default for training).",
        ),
    ] = None

    def settings(self) -> dict[str, Any]:
        """Fields of a benchmark's settings; `methods` only if given, because each benchmark has its own default."""
        named = dict(vars(self))
        methods = named.pop("methods")
        if methods is not None:
            named["methods"] = tuple(name.strip() for name in methods.split(",") if name.strip())
        return named


@dataclass(frozen=True)
class Shapes(Models):
    """A backbone by its shape, without weights."""

    backbone: Annotated[
        str | None,
        typer.Option("--backbone", metavar="NAME", help="A shape such as llama-2-7b, 'tiny', or a folder's config."),
    ] = "tinyllama-1.1b"


@dataclass(frozen=True)
class RunningModels(Models):
    """A backbone with weights."""

    attention: Annotated[
        str | None, typer.Option("--attention", help="transformers' attn_implementation, such as sdpa or eager.")
    ] = None


@dataclass(frozen=True)
class Generation:
    """The options of generation."""

    beams: Beams = "1,3"
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Length of the prompts.")] = 64
    new_tokens: NewTokens = 32
    round_seconds: Annotated[
        float,
        typer.Option("--round-seconds", help="Methods that would exceed this time per run generate fewer tokens."),
    ] = 120.0
    compile: Annotated[
        bool,
        typer.Option("--compile", help="Decode with a static cache and a compiled forward pass, for every method."),
    ] = False

    def settings(self) -> dict[str, Any]:
        """Fields of a benchmark's settings."""
        return {**vars(self), "beams": numbers("--beams", self.beams)}


@dataclass(frozen=True)
class TenantsGeneration(Generation):
    """The options of generation for many tenants."""

    beams: Beams = "1"
    new_tokens: NewTokens = 16


@dataclass(frozen=True)
class Measurement:
    """Where and how often to measure, and how to print the result."""

    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Measurements of each method, in turn with the others.")
    ] = 5
    device: options.Device = None
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Number of torch threads; by default torch's choice.")
    ] = None
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=options.LARGEST_SEED, help="Seed of weights and prompts.")
    ] = 0
    as_json: options.AsJson = False

    def settings(self) -> dict[str, Any]:
        """Fields of a benchmark's settings."""
        return {"rounds": self.rounds, "device": self.device, "seed": self.seed}


def numbers(option: str, text: str) -> tuple[int, ...]:
    """The values of an option, separated by commas.

    Raises:
        MiLoraError: If there is none, or one is not a whole number.
    """
    try:
        found = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise MiLoraError(f"{option} takes whole numbers separated by commas, such as 1,3; found {text!r}.") from error
    if not found:
        raise MiLoraError(f"{option} has no numbers; give some, such as 1,3.")
    return found
