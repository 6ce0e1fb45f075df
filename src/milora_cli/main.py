"""`milora`: its sub-commands, and the one place that turns a user's mistake into one line and an exit status."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from types import ModuleType
from typing import Annotated, Any

import typer

from milora_cli import bench, demo, evaluate, export, generate, lm_eval, params, route, serve, train
from milora_cli.streams import OUTPUT, close_progress_bars, drop_output
from milora_core.errors import MiLoraError
from milora_core.files import is_disk_full
from milora_core.interruption import Interrupted

COMMANDS: dict[str, ModuleType] = {
    "demo": demo,
    "train": train,
    "generate": generate,
    "serve": serve,
    "evaluate": evaluate,
    "lm-eval": lm_eval,
    "params": params,
    "bench": bench,
    "route": route,
    "export": export,
}
"""The sub-commands in the order of `milora --help`: modules with a function `command` (and `SETTINGS` for
`Typer.command` if it parses its own arguments), or with an `app` of sub-commands. They are imported at every start, so
they must not import `milora`, which loads torch and PEFT, before the command runs."""

BROKEN_PIPE = 141
"""The status of a program that SIGPIPE ended."""

# Typer has its own copy of click since 0.2x and used the real one before; both have this class here.
_UsageError: Any = typer.BadParameter.__base__

DEBUG = "--debug"
COMPLETION = "_MILORA_COMPLETE"
"""The environment variable with which a shell requests completions."""

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
        bool,
        typer.Option(
            DEBUG, envvar="MILORA_DEBUG", help="Show a traceback for user mistakes too; allowed at any position."
        ),
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
        arguments: The arguments after `milora`; by default the process's.

    Returns:
        The exit status: 0 on success, 1 if a part of the work failed (the rest is kept), 2 after a user's mistake (one
        line on standard error), 128 + signal after SIGINT, SIGTERM or SIGHUP, 141 if standard output is closed by its
        reader.

    Raises:
        Exception: Anything that is not a user's mistake, so Python prints its traceback and exits with 1. With
            `--debug` or `MILORA_DEBUG=1` also mistakes.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = DEBUG in arguments or os.environ.get("MILORA_DEBUG", "0") not in ("", "0", "false")
    # Removed here, so it can be appended to a command that just failed.
    arguments = [argument for argument in arguments if argument != DEBUG] or ["--help"]
    try:
        with warnings.catch_warnings():
            if not debug:
                # Users of the command cannot act on deprecation warnings.
                warnings.simplefilter("ignore", FutureWarning)
                warnings.simplefilter("ignore", DeprecationWarning)
            status = _invoke(arguments)
        sys.stdout.flush()
    except _UsageError as error:
        help_of = error.ctx.command_path if error.ctx else "milora"
        return _complain(f"{error.format_message().rstrip('.')} (see {help_of} --help)", 2)
    except Interrupted as interrupted:
        return _complain(str(interrupted), interrupted.status)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # rich's reaction to a broken pipe
            return BROKEN_PIPE
        raise
    except (MiLoraError, OSError) as error:
        if isinstance(error, OSError) and error.filename == OUTPUT:
            drop_output()
            if isinstance(error, BrokenPipeError):
                return BROKEN_PIPE
        if debug:
            raise
        return _complain(_message(error), 2)
    except Exception as error:
        if debug or not is_disk_full(error):
            raise
        return _complain(f"No space left on a disk; free some space: {error}", 2)
    return status


def _invoke(arguments: list[str]) -> int:
    if COMPLETION in os.environ:
        app(prog_name="milora")
    # Not with `app(...)`, which replaces the statuses of an interruption and a broken pipe.
    command = typer.main.get_command(app)
    try:
        with command.make_context("milora", arguments) as context:
            status = command.invoke(context)
    except typer.Exit as ended:
        status = ended.exit_code
    return status if isinstance(status, int) else 0


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror is not None:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return str(error)


def _complain(message: str, status: int) -> int:
    # If standard error is full or broken, the message is dropped and the status still counts.
    with suppress(OSError):
        close_progress_bars()
        print(f"milora: {' '.join(message.split())}", file=sys.stderr)
    return status
