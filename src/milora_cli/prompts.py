"""The prompts that a command's options select, with each row's other fields."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milora_core.errors import DataError, MiLoraError

if TYPE_CHECKING:
    from milora.evaluation.predictions import Request
    from milora.tasks.rows import Row


def read_requests(
    prompts: Sequence[str],
    data: str | None,
    *,
    split: str = "test",
    data_dir: Path | None = None,
    limit: int | None = None,
) -> list[Request]:
    """The prompts of `--prompt`, of `--data`, or of standard input, one per line.

    The rows of a file, a pipe or, with `--data -`, of standard input need no completion. They may name their `adapter`.

    Raises:
        MiLoraError: If both options are given, there is no prompt, or a prompt is empty.
        DataError: If the data cannot be read.
    """
    if prompts and data is not None:
        raise MiLoraError("Give --prompt or --data, not both.")
    if data is None and not prompts and sys.stdin is not None and sys.stdin.isatty():
        raise MiLoraError("No prompt: give --prompt TEXT, --data FILE, or lines on standard input.")

    from milora.evaluation.predictions import Request
    from milora.tasks.files import STANDARD_INPUT, read_text_lines

    if data is not None:
        requests = _from_source(data, split, data_dir)
    elif prompts:
        requests = [Request(_argument(prompt)) for prompt in prompts]
    else:
        requests = [Request(line) for line in read_text_lines(Path(STANDARD_INPUT))]
    if not requests:
        raise MiLoraError("Standard input is empty: give --prompt TEXT, --data FILE, or lines on standard input.")
    if any(isinstance(request.prompt, str) and not request.prompt.strip() for request in requests):
        raise MiLoraError("A --prompt is empty: the routers need at least one word.")
    return requests[:limit]


def _argument(text: str) -> str:
    """A process argument as UTF-8 text, in any locale.

    Raises:
        MiLoraError: If it is not UTF-8.
    """
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        # Python keeps bytes that the locale cannot decode as surrogates.
        try:
            return os.fsencode(text).decode()
        except UnicodeError as error:
            raise MiLoraError(f"--prompt {text!a} is not UTF-8: encode it in UTF-8.") from error


def _from_source(source: str, split: str, data_dir: Path | None) -> list[Request]:
    from milora.evaluation.predictions import Request
    from milora.tasks import registry
    from milora.tasks.files import is_stream, read_values
    from milora.tasks.sources import read_rows

    path = Path(source).expanduser()
    if source in registry.names() or not (path.is_file() or is_stream(path)):
        return [Request(row.prompt, row.answer) for row in read_rows(source, split, data_dir)]
    return [
        Request(row.prompt, row.answer, _adapter(record, where))
        for where, record in read_values(path)
        for row in _rows(record, where)
    ]


def _rows(record: object, where: str) -> list[Row]:
    from milora.tasks.rows import read_records

    if isinstance(record, Mapping) and "prompt" in record and record.get("completion") is None:
        # Generation needs no completion; a placeholder satisfies the strict reader of training rows.
        text = [{"role": "assistant", "content": "?"}] if isinstance(record["prompt"], list) else "?"
        record = {**record, "completion": text}
    return read_records([(where, record)], where)


def _adapter(record: Any, where: str) -> str | None:
    adapter = record.get("adapter")
    if adapter is not None and not isinstance(adapter, str):
        raise DataError(f"{where}: `adapter` must be a name; found {adapter!r}")
    return adapter
