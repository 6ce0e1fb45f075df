"""The command line: a file a sub-command, each with a function `command`, collected in `milora_cli.main`."""

from milora_cli.main import main

__all__ = ["main"]
