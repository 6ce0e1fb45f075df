"""`milora export`: one route of an adapter as a plain LoRA adapter."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from milora_cli import options
from milora_cli.output import json_only, quiet_libraries
from milora_core.errors import MiLoraError
from milora_core.files import require_vacant

if TYPE_CHECKING:
    from milora_core.routing import Route


def command(
    adapter: options.Adapter,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder for the LoRA adapter.")],
    backbone: options.Backbone = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", metavar="TEXT", help="Freeze the route of this prompt."),
    ] = None,
    route: Annotated[
        Path | None,
        typer.Option("--route", metavar="FILE", help="Freeze a route that milora route wrote (.safetensors or .json)."),
    ] = None,
    row: Annotated[int, typer.Option("--row", min=0, help="Index of the prompt in the route file, from 0.")] = 0,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Freeze one route of a MiLoRA adapter into a plain LoRA adapter, for any engine with LoRA support."""
    with json_only(as_json) as print_result, ExitStack() as lock:
        if (prompt is None) == (route is None):
            raise MiLoraError("Give either --prompt TEXT or --route FILE: the LoRA adapter holds one frozen route.")

        from milora.backbone.loading import load_for_inference
        from milora.inference.routing import route_prompts
        from milora.locks import writing_file_alone
        from milora.tuners.milora.export import export_route
        from milora_cli.prompts import read_requests
        from milora_cli.route import require_routers

        quiet_libraries()
        frozen = _read_route(route, row) if route is not None else None
        prompts = [] if prompt is None else [request.prompt for request in read_requests([prompt], None)]
        require_routers(adapter)
        require_vacant(output)
        lock.enter_context(writing_file_alone(output, "wait until it ends, or use another --output"))
        model, tokenizer = load_for_inference(adapter, backbone, dtype=dtype, device=device)
        if frozen is None:
            frozen = route_prompts(model, tokenizer, prompts)
        config = export_route(model, frozen, output, tokenizer=tokenizer)
        modules = len(config.target_modules)
        print_result({"output": str(output), "modules": modules, "experts": frozen.chosen_experts()})
        if not as_json:
            typer.echo(f"LoRA on {modules} modules written to {output}")


def _read_route(path: Path, row: int) -> Route:
    """A row of a saved route.

    Raises:
        MiLoraError: If the file is not a route, or has no such row.
    """
    from milora.tasks.files import read_json
    from milora_core.routing import Route

    if path.suffix.lower() == ".json":
        found: Any = read_json(path)
        try:
            saved = Route.from_dict(found)
        except (TypeError, MiLoraError) as error:
            raise MiLoraError(f"{path} is not a route in JSON: {str(error).rstrip('.')}.") from error
    else:
        saved = Route.load(path)
    if row >= len(saved):
        raise MiLoraError(
            f"{path} has the routes of {len(saved)} prompts, the rows 0 to {len(saved) - 1}; found {row}."
        )
    return saved[row]
