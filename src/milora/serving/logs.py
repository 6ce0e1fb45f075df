"""Structured logs: one JSON object per line on standard error. They contain no prompts, texts or keys."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import datetime, timezone
from typing import Any, TextIO

LOGGER = logging.getLogger("milora.serving")


def log(event: str, level: int = logging.INFO, error: BaseException | None = None, **fields: Any) -> None:
    """Writes a line.

    Args:
        event: The event's name, one or two words with underscores.
        level: As in `logging`.
        error: An exception. Its type and location are logged, but not its message, which may quote a prompt.
        **fields: Further fields of the line.
    """
    LOGGER.log(level, event, exc_info=error, extra={"fields": fields})


def configure(level: str, stream: TextIO | None = None) -> None:
    """Writes the server's and uvicorn's logs to a stream as JSON, and warnings and errors of other libraries.

    Args:
        level: As in `logging`, in upper or lower case.
        stream: Standard error by default.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    LOGGER.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)


class JsonFormatter(logging.Formatter):
    """Formats a record as a line of JSON: `time`, `level`, `event`, then the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        is_ours = hasattr(record, "fields")
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.msg if is_ours else "library",
        }
        if is_ours:
            line.update(record.__dict__["fields"])
        else:
            # Formatted messages of libraries may quote a request; the message template does not.
            line.update(logger=record.name, message=str(record.msg).partition("\n")[0])
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = type(record.exc_info[1]).__name__
            line["at"] = [
                f"{frame.filename}:{frame.lineno} {frame.name}"
                for frame in traceback.extract_tb(record.exc_info[2])[-12:]
            ]
        return json.dumps(line, ensure_ascii=False, default=str)
