"""The command `milora`, also as `python -m milora_cli`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from milora_cli.streams import prepare_streams
from milora_core.encoding import use_utf8
from milora_core.errors import MissingExtraError, importing
from milora_core.interruption import end_on_signals, handle_signals


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs [`milora_cli.main.main`] with signal handlers and safe streams, or names the extra that the command line
    needs.

    Args:
        arguments: The arguments after `milora`; by default the process's.

    Returns:
        The exit status.
    """
    handle_signals()
    use_utf8()
    prepare_streams()
    try:
        with importing("cli", "the command line"):
            from milora_cli import main as command_line
    except MissingExtraError as error:
        print(f"milora: {error}", file=sys.stderr)
        return 2
    try:
        return command_line.main(arguments)
    finally:
        end_on_signals()


if __name__ == "__main__":
    sys.exit(main())
