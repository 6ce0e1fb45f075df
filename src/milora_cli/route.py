"""`milora route`: which experts the routers choose for prompts, as a table, a picture, or a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from milora_cli import options
from milora_cli.output import json_only, print_table, progress_bar, quiet_libraries, reserved
from milora_cli.prompts import read_requests
from milora_core.errors import MiLoraError
from milora_core.files import write_text

if TYPE_CHECKING:
    from rich.table import Table

    from milora.tasks.rows import Text
    from milora_core.routing import Route

PICTURES = (".png", ".svg", ".pdf")
FORMATS = (*PICTURES, ".json", ".safetensors")


def command(
    adapter: options.Adapter,
    backbone: options.Backbone = None,
    prompt: options.Prompts = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="SOURCE",
            help="A task, file, folder or hub dataset (owner/name or owner/name:configuration); repeat to compare.",
        ),
    ] = None,
    split: options.Split = "test",
    data_dir: options.DataDirectory = None,
    limit: options.Limit = None,
    batch_size: options.BatchSize = 8,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output", metavar="FILE", help="Heat map (.png, .svg, .pdf), .json or .safetensors; repeatable."
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show which experts an adapter's routers choose, by block. For one prompt this prints the choice and its
    probabilities, for several the share of prompts that chose each expert.
    """
    with json_only(as_json) as print_result, ExitStack() as outputs:
        for path in output or []:
            if path.suffix.lower() not in FORMATS:
                raise MiLoraError(f"--output {path}: the name must end in one of {', '.join(FORMATS)}.")
        prompts: dict[str, list[Text]] = {}
        # Several sources are read one after the other; without a source the prompts come from --prompt or standard
        # input.
        sources: list[str | None] = [*data] if data else [None]
        for source in sources:
            requests = read_requests(prompt or [], source, split=split, data_dir=data_dir, limit=limit)
            prompts[source or "prompts"] = [request.prompt for request in requests]

        from milora.backbone.loading import load_for_inference
        from milora.inference.routing import route_prompts
        from milora_core.routing import Route

        quiet_libraries()
        require_routers(adapter)
        outputs.enter_context(reserved(output or [], "route.json"))
        model, tokenizer = load_for_inference(adapter, backbone, dtype=dtype, device=device)
        with progress_bar() as progress:
            routes = {
                label: route_prompts(model, tokenizer, texts, batch_size, progress) for label, texts in prompts.items()
            }
        whole = Route.cat(list(routes.values()))
        result = {
            "prompts": [text for texts in prompts.values() for text in texts],
            "sources": [label for label, texts in prompts.items() for _ in texts],
            **whole.to_dict(),
        }
        for path in output or []:
            _write(path, routes, whole, result)
        print_result(result)
        if not as_json:
            for label, route in routes.items():
                print_table(table(route, label))


def require_routers(adapter: str) -> None:
    """Checks that an adapter has routers, before the backbone is loaded.

    Raises:
        MiLoraError: If there is no adapter, or it is of another method.
    """
    from milora.backbone.loading import read_adapter_config
    from milora.tuners.milora import MiLoraConfig

    config = read_adapter_config(adapter)
    if not isinstance(config, MiLoraConfig):
        raise MiLoraError(
            f"{adapter} is a {config.peft_type.value} adapter, which has no routers; give a MILORA adapter."
        )


def table(route: Route, title: str) -> Table:
    """A route as a table: one row per block, one column per expert."""
    from rich.table import Table

    from milora.plots import short_blocks, short_experts

    one = len(route) == 1
    result = Table(title="chosen experts and their probability" if one else f"{title}: share of {len(route)} prompts")
    result.add_column("block", justify="right", no_wrap=True)
    for name in short_experts(route.experts):
        result.add_column(name, justify="right", no_wrap=True)
    numbers = (route.probabilities[:, 0] if one else route.share()).tolist()
    at_work = route.chosen.any(dim=1).tolist()
    for block, of_block, chosen in zip(short_blocks(route.blocks), numbers, at_work, strict=True):
        cells = [_cell(number, is_chosen, one) for number, is_chosen in zip(of_block, chosen, strict=True)]
        result.add_row(block, *cells)
    return result


def _cell(number: float, chosen: bool, one: bool) -> str:
    if one:
        return f"[bold cyan]● {number:.2f}[/]" if chosen else f"[dim]{number:.2f}[/]"
    return f"{number:.0%}" if chosen else "[dim]·[/]"


def _write(path: Path, routes: Mapping[str, Route], whole: Route, result: Mapping[str, Any]) -> None:
    kind = path.suffix.lower()
    if kind in PICTURES:
        from milora.plots import route_heat_map

        route_heat_map(routes if len(routes) > 1 else whole, path)
    elif kind == ".json":
        write_text(path, json.dumps(result, ensure_ascii=False) + "\n")
    else:
        whole.save(path)
