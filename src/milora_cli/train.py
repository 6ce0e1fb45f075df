"""`milora train`: TRL's flags and YAML, plus flags for data and method."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from milora_core.errors import MiLoraError, did_you_mean

if TYPE_CHECKING:
    from milora.training import DataArguments, MethodArguments, TrainingArguments, TrainingResult


SETTINGS: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    "add_help_option": False,
}
"""TRL's parser reads all flags."""


def command(context: typer.Context) -> None:
    """Fine-tune an adapter of any of the paper's methods on tasks, files or hub data sets.

    Takes every flag of TRL's SFTTrainer (`milora train --help-all` lists them), and a YAML file of them with --config.
    """
    flags = list(context.args)
    as_json = "--json" in flags
    flags = [flag for flag in flags if flag != "--json"]
    if "--help" in flags or "-h" in flags or "--help-all" in flags:
        _print_help(everything="--help-all" in flags)
        raise typer.Exit
    # Libraries print to standard output, some on import; only the result belongs there.
    with contextlib.redirect_stdout(sys.stderr):
        data, method, arguments = parse(flags)
        from milora.training import train

        result = train(data, method, arguments)
    if arguments.process_index > 0:
        return
    if as_json:
        typer.echo(json.dumps(result.to_dict(), allow_nan=False))
    else:
        _print_result(result)
    if result.nonfinite_tensors:
        raise MiLoraError(
            f"Training diverged: the adapter in {result.output} has NaN or infinity in {result.nonfinite_tensors} "
            "tensors. Lower --learning-rate."
        )


def _print_result(result: TrainingResult) -> None:
    for name, counts in result.rows.items():
        no_room = f" ({counts['no_room']} of them for the prompt alone)" if counts["no_room"] else ""
        typer.echo(
            f"{name}: {counts['train']} training rows, {counts['dev']} dev rows, "
            f"{counts['too_long'] + counts['no_room']} left out for their length{no_room}"
        )
    early = ", where the dev perplexity no longer fell" if result.stopped_early else ""
    typer.echo(f"{result.method}: {result.steps} steps in {result.seconds:.0f} s{early}")
    perplexities = [result.dev_perplexity_before, result.dev_perplexity_best]
    measured = [f"{perplexity:.3f}" for perplexity in perplexities if perplexity is not None]
    if measured:
        typer.echo(f"dev perplexity {' -> '.join(measured)}")
    typer.echo(f"adapter in {result.output}")


def parse(flags: list[str]) -> tuple[DataArguments, MethodArguments, TrainingArguments]:
    """Parses flags and the YAML file that they may name.

    Raises:
        MiLoraError: For an unknown flag or key, a value of the wrong type, or a file that is missing or not a YAML
            mapping.
    """
    from milora.tasks.files import read_yaml
    from milora.tasks.folder import data_folder

    parser = _parser()
    flags, file = _apart_from_file(flags)
    names = _names(parser)
    for spelled in (flag.partition("=")[0] for flag in flags if flag.startswith("--")):
        name = spelled[2:].replace("_", "-")
        if name not in names:
            raise MiLoraError(f"Unknown flag {spelled}{did_you_mean(name, sorted(names))}")
    if file is not None:
        read_yaml(Path(file))  # TRL's parser accepts repeated keys and does not name the file in errors
    try:
        parsed: Any = parser.parse_args_and_config(flags, return_remaining_strings=False)
    except MiLoraError:
        raise
    except (ValueError, TypeError, OSError) as error:
        raise MiLoraError(str(error).splitlines()[0]) from error
    data, method, arguments = parsed
    folder = data_folder(data.data_dir)
    data.data_dir = None if folder is None else str(folder)
    return data, method, arguments


def _apart_from_file(flags: list[str]) -> tuple[list[str], str | None]:
    """The flags with `--config=FILE` split into `--config FILE`, as TRL's parser requires, and the file.

    Raises:
        MiLoraError: If `--config` has no file.
    """
    apart = [part for flag in flags for part in (flag.split("=", 1) if flag.startswith("--config=") else [flag])]
    if "--config" not in apart:
        return apart, None
    file = next(iter(apart[apart.index("--config") + 1 :]), "")
    if not file or file.startswith("--"):
        raise MiLoraError("--config needs a file: --config recipe.yaml. See milora train --help.")
    return apart, file


def _parser() -> Any:
    # First, because it names the extra if TRL is missing.
    from milora.training import DataArguments, MethodArguments, TrainingArguments

    from trl import TrlParser  # isort: skip

    class Parser(TrlParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            if "required" in message and "--backbone" in message:
                message = "No --backbone given: pass a model folder, a hub id, or 'tiny' (bundled)"
            raise MiLoraError(f"{message}. See milora train --help.")

        def set_defaults_with_config(self, **values: Any) -> list[str]:
            # A file may also use a flag's aliases.
            names = {option.lstrip("-"): action.dest for action in self._actions for option in action.option_strings}
            values = {names.get(name, name): value for name, value in values.items()}
            for name, value in values.items():
                if value is False and self._takes_no(name):
                    # YAML reads an unquoted no or off as a boolean.
                    values[name] = "none" if name == "report_to" else "no"
            remaining: list[str] = super().set_defaults_with_config(**values)
            return remaining

        def _takes_no(self, name: str) -> bool:
            """Whether `no` is one of a setting's choices, as for the evaluation, save and log strategies."""
            return name == "report_to" or any(
                "no" in (action.choices or ()) for action in self._actions if action.dest == name
            )

    parser = Parser((DataArguments, MethodArguments, TrainingArguments), prog="milora train", allow_abbrev=False)
    for action in parser._actions:
        if action.option_strings[0].startswith("--no_"):
            # transformers gives it the help text of the positive switch and a meaningless default.
            action.help, action.default = f"Turn --{action.dest} off.", argparse.SUPPRESS
    return parser


def _names(parser: Any) -> set[str]:
    spelled = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
    return {name.replace("_", "-") for name in spelled} | {"config"}


def _print_help(*, everything: bool) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        parser = _parser()
        from milora.training import DataArguments, MethodArguments, TrainingArguments

    if everything:
        parser.print_help()
        return

    own = [name for kind in (DataArguments, MethodArguments, TrainingArguments) for name in kind.__annotations__]
    # A switch that is on by default has a second action that turns it off, after the first one.
    by_name = {action.dest: action for action in reversed(parser._actions)}
    typer.echo("Usage: milora train --backbone NAME --task NAME[,NAME...] [--method NAME] [--output-dir DIR] ...\n")
    typer.echo("  --config FILE  YAML with any of these; flags override it\n  --json  print the result as JSON")
    for name in own:
        action = by_name[name]
        default = "" if action.required or action.default in (None, []) else f" (default: {action.default})"
        flag = name.replace("_", "-")
        no = f", --no-{flag}" if action.default is True else ""
        typer.echo(f"  --{flag}{no}  {str(action.help).splitlines()[0]}{default}")
    typer.echo("\nUnderscores work too. So does every other flag of TRL's SFTConfig: milora train --help-all")
