"""`milora lm-eval`: lm-eval's command line with our model class and the local tasks."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import typer

from milora_core.errors import MiLoraError

SETTINGS: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    "add_help_option": False,
}
"""All flags are left for lm-eval's parser."""

DATA_DIR_FLAG = "--data_dir"
OUTPUT_FLAGS = ("--output_path", "-o")

HELP = """\
milora lm-eval is lm-eval with our models (--model milora, the default here), whose prompts are routed on the context
alone, and with lm-eval's MMLU, BBH and GSM8K tasks on local files, by their names with _local behind them.

  --data_dir DIR  the folder with mmlu, bbh and gsm8k (default: MILORA_DATA_DIR)
  --json          print what --output_path would save, and nothing else

lm-eval's own flags:
"""


def command(context: typer.Context) -> None:
    """Evaluate on lm-eval's tasks; prompts are routed on the context alone.

    Takes every flag of lm-eval (`milora lm-eval --help` lists them) and --data_dir.
    """
    flags = list(context.args)
    if not flags or flags in (["--help"], ["-h"]):
        typer.echo(HELP)
        _print_help_of_lm_eval()
        raise typer.Exit
    as_json = "--json" in flags
    flags = [flag for flag in flags if flag != "--json"]
    data_dir = _take(flags, DATA_DIR_FLAG)
    from milora.evaluation.lm_eval import run

    if not as_json:
        run(flags, data_dir)
        return
    if any(flag.partition("=")[0] in OUTPUT_FLAGS for flag in flags):
        raise MiLoraError("--json prints what --output_path would save: pass one of them.")
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(sys.stderr):
            run([*flags, "--output_path", folder], data_dir)
        (results,) = Path(folder).rglob("results_*.json")
        typer.echo(json.dumps(json.loads(results.read_text())))


def _print_help_of_lm_eval() -> None:
    from milora.evaluation.lm_eval import run

    # Its parser ends the process after its help.
    with contextlib.suppress(SystemExit):
        run(["run", "--help"], None)


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
