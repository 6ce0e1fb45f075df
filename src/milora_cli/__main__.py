"""The command `milora`, also as `python -m milora_cli`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs [`milora_cli.main.main`], or says which extra the command line needs.

    Args:
        arguments: The arguments after `milora`; by default the process's.

    Returns:
        The exit status.
    """
    try:
        from milora_cli import main as command_line
    except ModuleNotFoundError as error:
        print(f'milora: the command line needs {error.name}: pip install "milora[cli]"', file=sys.stderr)
        return 2
    return command_line.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
