"""`milora`: its sub-commands, and the one place that turns a user's mistake into a line and a status."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from types import ModuleType
from typing import Annotated, Any

import typer

from milora_cli import bench, demo, evaluate, export, generate, lm_eval, params, report, route, train
from milora_core.errors import MiLoraError

COMMANDS: dict[str, ModuleType] = {
    "demo": demo,
    "train": train,
    "generate": generate,
    "evaluate": evaluate,
    "lm-eval": lm_eval,
    "params": params,
    "bench": bench,
    "report": report,
    "route": route,
    "export": export,
}
"""The sub-commands in the order of `milora --help`: modules with a function `command`, and where it parses its own
arguments with `SETTINGS` for `Typer.command`; or with an `app` of sub-commands of their own. They are imported at
every start, so they import nothing of `milora`, which loads torch and PEFT, before the command runs."""

USER_MISTAKES = (
    MiLoraError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)

# Typer carries its own copy of click since 0.2x and used the real one before; both have this class in this place.
_UsageError: Any = typer.BadParameter.__base__

DEBUG = "--debug"

app = typer.Typer(
    name="milora",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    # `--data_dir` works too: the libraries' own command lines spell their options with underscores.
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"milora {version('milora')}")
        raise typer.Exit


@app.callback()
def milora(
    debug: Annotated[
        bool, typer.Option(DEBUG, envvar="MILORA_DEBUG", help="Show a traceback for user mistakes too; goes anywhere.")
    ] = False,
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """MiLoRA: mixture of LoRA experts, routed once per prompt."""


for _name, _module in COMMANDS.items():
    if hasattr(_module, "app"):
        app.add_typer(_module.app, name=_name)
    else:
        app.command(_name, **getattr(_module, "SETTINGS", {}))(_module.command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: What follows `milora`; those of the process by default.

    Returns:
        The exit status: 0 on success, 1 if a part of what was asked could not be had (what could is kept), 2 after a
        user's mistake (one line on standard error says which), 130 when interrupted.

    Raises:
        Exception: Whatever is not a user's mistake, so that Python prints its traceback and exits with 1; under
            `--debug` or `MILORA_DEBUG=1` mistakes too.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = DEBUG in arguments or os.environ.get("MILORA_DEBUG", "0") not in ("", "0", "false")
    # Taken out by hand, so that it can be added at the end of a command that just failed.
    arguments = [argument for argument in arguments if argument != DEBUG] or ["--help"]
    try:
        with warnings.catch_warnings():
            if not debug:
                # What libraries tell each other's developers is nothing that a user of the command can act on.
                warnings.simplefilter("ignore", FutureWarning)
                warnings.simplefilter("ignore", DeprecationWarning)
            status = app(args=arguments, prog_name="milora", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted", 130)
    except _UsageError as error:
        help_of = error.ctx.command_path if error.ctx else "milora"
        return _complain(f"{error.format_message().rstrip('.')} (see {help_of} --help)", 2)
    except USER_MISTAKES as error:
        if debug:
            raise
        return _complain(_message(error), 2)
    return status if isinstance(status, int) else 0


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _complain(message: str, status: int) -> int:
    print(f"milora: {' '.join(message.split())}", file=sys.stderr)
    return status
