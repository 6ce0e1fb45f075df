"""The command line: a file a sub-command, each with a function `command`, collected in `milora.cli.main`."""

from milora.cli.main import main

__all__ = ["main"]
