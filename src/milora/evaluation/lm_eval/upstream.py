"""All that is touched of lm-eval's inner parts: its command line's parser, and how it reads its tasks' files.

lm-eval has no entry points for models: a class is known once its module is imported. Hence a command of our own, which
imports it and then leaves everything to lm-eval.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import lm_eval
from lm_eval._cli.harness import HarnessCLI
from lm_eval.tasks._yaml_loader import load_yaml

from milora_core.errors import MiLoraError


def parse(flags: Sequence[str]) -> tuple[HarnessCLI, argparse.Namespace]:
    """lm-eval's command line, and what its parser makes of the flags.

    Raises:
        MiLoraError: If it refuses them.
    """
    complaint = io.StringIO()
    # It reads the process's own arguments, and takes "run" for granted where there are at least two.
    with mock.patch.object(sys, "argv", ["lm-eval", *flags]), contextlib.redirect_stderr(complaint):
        command_line = HarnessCLI()
        try:
            return command_line, command_line.parse_args()
        except SystemExit as stop:
            if not stop.code:
                raise
            message = complaint.getvalue().strip().splitlines()[-1:] or ["lm-eval refuses the flags"]
            raise MiLoraError(
                f"{message[0].partition('error: ')[2] or message[0]}. See milora lm-eval --help."
            ) from None


def task_files(families: Sequence[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The files of lm-eval's own tasks and groups in some of its folders, with what they and their parents say."""
    root = Path(lm_eval.__file__).parent / "tasks"
    for family in families:
        for path in sorted((root / family).rglob("*.yaml")):
            yield path, load_yaml(path, resolve_func=False)
