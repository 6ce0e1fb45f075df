"""Generates the reference of the command line from the commands."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import typer

from milora_cli import train
from milora_cli.main import app

INTRODUCTION = """# Command line

This page is generated from the commands. `--json` prints one JSON object on standard output; progress and logs go to
standard error. The exit status is 0 on success, 1 if a part of the work failed and the rest is kept, 2 after a mistake
(one line on standard error says what is wrong and how to fix it), 128 + the signal's number after a signal, and 141 if
the reader of standard output has closed it. Options may be spelled with underscores: `--data_dir` is `--data-dir`.
"""


def page() -> str:
    """The page's Markdown."""
    root = typer.main.get_command(app)
    return "\n".join([INTRODUCTION, *_of_command("milora", root, level=2)]) + "\n"


def _of_command(name: str, command: Any, level: int) -> Iterator[str]:
    if name == "milora train":
        yield from _of_train(command, level)
        return
    yield f"{'#' * level} {name}\n"
    yield f"{_text(command.help or '')}\n"
    rows = [_row(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)]
    if rows:
        yield from _table(rows)
    for child, sub_command in getattr(command, "commands", {}).items():
        # All direct sub-commands of `milora` have its heading level.
        yield from _of_command(f"{name} {child}", sub_command, level + (name != "milora"))


def _of_train(command: Any, level: int) -> Iterator[str]:
    """The options of `milora train`, which TRL's parser defines."""
    parser = train._parser()
    own = [name for kind in _argument_classes() for name in kind.__annotations__]
    actions = {action.dest: action for action in reversed(parser._actions)}
    yield f"{'#' * level} milora train\n"
    yield f"{_text(command.help or '')}\n"
    rows = [
        ("`--config FILE`", "A YAML file with any of these; options override it."),
        ("`--json`", "Print the result as one JSON object."),
    ]
    rows += [_train_row(actions[name]) for name in own]
    yield from _table(rows)


def _argument_classes() -> tuple[type, ...]:
    from milora.training import DataArguments, MethodArguments, TrainingArguments

    return DataArguments, MethodArguments, TrainingArguments


def _train_row(action: argparse.Action) -> tuple[str, str]:
    name = f"--{action.dest.replace('_', '-')}"
    if action.default is True:
        name += f", --no-{action.dest.replace('_', '-')}"
    return f"`{name}`", _described(str(action.help).splitlines()[0], action.default, action.required)


def _row(parameter: Any) -> tuple[str, str]:
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    metavar = parameter.metavar if not getattr(parameter, "is_flag", False) else None
    help_text = getattr(parameter, "help", None) or ""
    variable = getattr(parameter, "envvar", None)
    if variable:
        help_text += f" Environment variable: `{variable}`."
    default = None if getattr(parameter, "is_flag", False) and not parameter.default else parameter.default
    return f"`{names}{f' {metavar}' if metavar else ''}`", _described(help_text, default, parameter.required)


def _described(text: str, default: Any, required: bool) -> str:
    text = _text(text)
    if required:
        return f"{text} Required."
    return text if default in (None, [], (), "", argparse.SUPPRESS) else f"{text} Default: `{default}`."


def _table(rows: list[tuple[str, str]]) -> Iterator[str]:
    yield "| option | |\n|---|---|"
    for name, text in rows:
        yield f"| {name.replace('|', chr(92) + '|')} | {text.replace('|', chr(92) + '|')} |"
    yield ""


def _text(text: str) -> str:
    return " ".join(text.split())
