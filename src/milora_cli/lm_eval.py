"""`milora lm-eval`: lm-eval's tasks on our models, and its MMLU, BBH and GSM8K on local files."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from milora_cli import options
from milora_core.errors import MiLoraError


def command(
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", metavar="NAME[,NAME...]", help="lm-eval's tasks, groups and tags; can be repeated."),
    ] = None,
    model_args: Annotated[
        list[str] | None,
        typer.Option("--model-args", metavar="KEY=VALUE[,...]", help="Such as peft=ADAPTER,dtype=bfloat16."),
    ] = None,
    model: Annotated[str, typer.Option("--model", help="lm-eval's model class.")] = "milora",
    data_dir: options.DataDirectory = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", metavar="DIR", help="Folder of further tasks (YAML).")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", min=0, help="Examples before each question; by default the task's.")
    ] = None,
    limit: Annotated[float | None, typer.Option("--limit", help="Rows per task, or their share if below 1.")] = None,
    batch_size: Annotated[str, typer.Option("--batch-size", help="A number, auto, or auto:N.")] = "1",
    max_batch_size: Annotated[int | None, typer.Option("--max-batch-size", min=1, help="Upper limit for auto.")] = None,
    device: options.Device = None,
    gen_kwargs: Annotated[
        str | None,
        typer.Option(
            "--gen-kwargs", metavar="KEY=VALUE[,...]", help="Arguments of generation, such as max_gen_toks=64."
        ),
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Format prompts with the tokenizer's chat template.")
    ] = False,
    fewshot_as_multiturn: Annotated[
        bool,
        typer.Option(
            "--fewshot-as-multiturn/--fewshot-as-one-turn", help="With a chat template, make each example a turn."
        ),
    ] = True,
    system_instruction: Annotated[
        str | None, typer.Option("--system-instruction", help="Text before every prompt.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", min=0, max=options.LARGEST_SEED, help="Seed of all generators; by default lm-eval's seeds."
        ),
    ] = None,
    use_cache: Annotated[
        str | None, typer.Option("--use-cache", metavar="PATH", help="Cache the model's responses in a database.")
    ] = None,
    output_path: Annotated[
        Path | None, typer.Option("--output-path", metavar="DIR", help="Save the results in lm-eval's format.")
    ] = None,
    log_samples: Annotated[bool, typer.Option("--log-samples", help="Save every request, too.")] = False,
    write_out: Annotated[bool, typer.Option("--write-out", help="Print the first prompts.")] = False,
    confirm_run_unsafe_code: Annotated[
        bool, typer.Option("--confirm-run-unsafe-code", help="Allow tasks that run model-written code.")
    ] = False,
    list_tasks: Annotated[bool, typer.Option("--list-tasks", help="Print the tasks' names and exit.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Evaluate on lm-eval's tasks; prompts are routed on the context only.

    Tasks whose name ends in `_local` (`mmlu_local`, `bbh_local`, `gsm8k_local`) read the files in --data-dir.
    """
    # lm-eval prints to standard output, also on import; only the result belongs there.
    with contextlib.redirect_stdout(sys.stderr):
        from milora.evaluation.lm_eval import run, task_names

    if list_tasks:
        names = task_names(data_dir)
        typer.echo(json.dumps(names) if as_json else "\n".join(names))
        return
    names = [name.strip() for given in tasks or [] for name in given.split(",") if name.strip()]
    if not names:
        raise MiLoraError("No tasks given: pass --tasks NAME[,NAME...]; --list-tasks prints their names.")
    if limit is not None and not limit > 0:
        raise MiLoraError(f"--limit must be more than 0; found {limit}.")
    seeds = {f"{kind}_seed": seed for kind in ("random", "numpy_random", "torch_random", "fewshot_random")}
    before = _files(output_path)
    with contextlib.redirect_stdout(sys.stderr):
        results = run(
            names,
            ",".join(model_args or []),
            model=model,
            data_dir=data_dir,
            include_path=include_path,
            output_path=output_path,
            log_samples=log_samples,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            device=device,
            gen_kwargs=gen_kwargs,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template and fewshot_as_multiturn,
            system_instruction=system_instruction,
            use_cache=use_cache,
            write_out=write_out,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
            **({} if seed is None else seeds),
        )
    if as_json:
        from lm_eval.utils import handle_non_serializable

        typer.echo(json.dumps(results, default=handle_non_serializable))
    else:
        _print_tables(results)
    if output_path is not None and not any(map(_is_whole, _files(output_path) - before)):
        # lm-eval logs the reason and continues.
        typer.echo(f"milora: lm-eval could not save the results above in {output_path}.", err=True)
        raise typer.Exit(1)


def _files(output: Path | None) -> set[Path]:
    if output is None:
        return set()
    return set(output.parent.glob("*.json") if output.suffix == ".json" else output.rglob("*.json"))


def _is_whole(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _print_tables(results: dict[str, Any]) -> None:
    from lm_eval.utils import make_table

    typer.echo(make_table(results))
    if "groups" in results:
        typer.echo(make_table(results, "groups"))
