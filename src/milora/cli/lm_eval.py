"""`milora lm-eval`: lm-eval's command line with our model class and the local tasks."""

from __future__ import annotations

from typing import Any

import typer

from milora.errors import MiLoraError

SETTINGS: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    "add_help_option": False,
}
"""All flags are left for lm-eval's parser."""

DATA_DIR_FLAG = "--data_dir"


def command(context: typer.Context) -> None:
    """Evaluate on lm-eval's tasks; prompts are routed on the context alone.

    Takes every flag of lm-eval (`milora lm-eval --help` lists them) and --data_dir.
    """
    flags = list(context.args)
    if not flags or flags in (["--help"], ["-h"]):
        typer.echo(
            "milora lm-eval is lm-eval with --model milora (the default here), and its MMLU, BBH and GSM8K tasks with\n"
            "_local behind their names on the files of a folder: --data_dir DIR, or MILORA_DATA_DIR.\n"
        )
        flags = ["run", "--help"]
    data_dir = _take(flags, DATA_DIR_FLAG)
    from milora.evaluation.lm_eval import run

    run(flags, data_dir)


def _take(flags: list[str], name: str) -> str | None:
    """Takes a flag and its value out of the others."""
    for index, flag in enumerate(flags):
        given, equals, value = flag.partition("=")
        if given.replace("-", "_") != name.replace("-", "_"):
            continue
        if not equals and index + 1 == len(flags):
            raise MiLoraError(f"{name} needs a folder.")
        taken = value if equals else flags[index + 1]
        del flags[index : index + (1 if equals else 2)]
        return taken
    return None
