"""The code blocks of a Markdown page, and a runner for them.

Every block runs unless the line above it is `<!-- not run: REASON -->`. `bash` blocks run in bash. All `python` blocks
of a page run in one Python process, so later blocks see earlier names. A block with `title="FILE"` is written to FILE
instead. Everything happens in the current folder.
"""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w+)?(?P<rest>[^`\n]*)$")
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.+) -->")
TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True)
class Block:
    """A fenced code block: language, code, number of its first line, title, and why it does not run."""

    language: str
    code: str
    line: int
    title: str | None
    not_run: str | None

    @property
    def runs(self) -> bool:
        """Whether the block is executed or written."""
        return self.not_run is None and (self.title is not None or self.language in ("bash", "python"))


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    blocks, number = [], 0
    while number < len(lines):
        opened = FENCE.match(lines[number])
        if opened is None:
            number += 1
            continue
        end = next(at for at in range(number + 1, len(lines)) if lines[at].strip() == "```")
        above = next((line for line in reversed(lines[:number]) if line.strip()), "")
        marker, title = NOT_RUN.search(above), TITLE.search(opened["rest"])
        blocks.append(
            Block(
                opened["language"] or "",
                textwrap.dedent("\n".join(lines[number + 1 : end])) + "\n",
                number + 2,
                title[1] if title else None,
                marker["reason"] if marker else None,
            )
        )
        number = end + 1
    return blocks


def run_page(page: Path) -> None:
    """Runs a page's blocks.

    Raises:
        SystemExit: A bash block failed.
        Exception: Any exception that a Python block raises.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if not block.runs:
            continue
        print(f"{page.name}:{block.line}", flush=True)
        if block.title is not None:
            Path(block.title).write_text(block.code, encoding="utf-8")
        elif block.language == "bash":
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], stdin=subprocess.DEVNULL, check=False)
            if done.returncode != 0:
                raise SystemExit(f"{page}:{block.line} ended with status {done.returncode}")
        else:
            # Padded with empty lines, so tracebacks show the page's line numbers.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)


if __name__ == "__main__":
    run_page(Path(sys.argv[1]))
