"""Predictions: generated texts, graded and written one by one to a file that a later run resumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milora.evaluation.compact_routes import compact_route
from milora.records import append_record, drop_half_line, read_records
from milora_core.errors import DataError, MiLoraError
from milora_core.files import writing

if TYPE_CHECKING:
    from milora.inference.generation import GeneratedText
    from milora.tasks.rows import Text
    from milora.tasks.task import Task

ELSEWHERE = "give another output, or remove the file"


@dataclass(frozen=True)
class Request:
    """A prompt to answer.

    Attributes:
        prompt: The model's input.
        answer: The gold answer, if any.
        adapter: The adapter that answers, if the model has several.
        group: The row's part of the task (MMLU's subject), if the task has parts.
    """

    prompt: Text
    answer: str | None = None
    adapter: str | None = None
    group: str | None = None


class Predictions:
    """The rows of a run, optionally in a file of JSON lines that a later run resumes.

    A row has `row` (the request's index), `prompt`, `output`, `tokens`, and `adapter` and `group` if they apply. With a
    gold answer it has `answer`, `parsed` (null if the output has no answer) and `correct`. With `routes` it has `route`
    (see [`compact_route`]; null if no router was used). In the file, `run` identifies the run. Rows beyond the last
    prompt, from a run over more rows, stay in the file and are ignored.

    Args:
        requests: The prompts.
        task: Parses the answers. Without a task, the whole output is compared with the answer.
        path: The file, or `None`.
        run: Identifies the run, so that rows of another adapter are not reused.
        routes: Whether rows have a `route`.

    Raises:
        MiLoraError: If the file has rows of other prompts or of another run, or its folder cannot be created.
    """

    def __init__(
        self, requests: Sequence[Request], task: Task | None, path: Path | None, run: str, *, routes: bool = False
    ) -> None:
        self._requests = requests
        self._task = task
        self._path = path
        self._run = run
        self._routes = routes
        self._rows: dict[int, dict[str, Any]] = {}
        if path is not None:
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            # A device or a pipe has no rows to resume.
            if path.is_file():
                self._resume(path)

    @property
    def path(self) -> Path | None:
        """The file."""
        return self._path

    def missing(self) -> list[int]:
        """The indices of prompts without a row."""
        return [index for index in range(len(self._requests)) if index not in self._rows]

    def add(self, index: int, text: GeneratedText) -> None:
        """Grades a text and writes its row immediately, so finished rows survive an interruption.

        Raises:
            MiLoraError: If the row cannot be written.
        """
        request = self._requests[index]
        row = self._start(index, text.text, text.tokens)
        if request.answer is not None:
            parsed = self._task.parse(text.text) if self._task else text.text.strip()
            is_correct: Callable[[str, str], bool] = self._task.is_correct if self._task else _same
            row |= {"answer": request.answer, "parsed": parsed, "correct": is_correct(text.text, request.answer)}
        if self._routes:
            row["route"] = None if text.route is None else compact_route(text.route)
        self._keep(index, row)

    def add_without_room(self, index: int) -> None:
        """Writes a wrong row for a prompt that was skipped because an answer would exceed the backbone's positions.

        Raises:
            MiLoraError: If the row cannot be written.
        """
        row = self._start(index, "", 0) | {"no_room": True}
        if self._requests[index].answer is not None:
            row |= {"answer": self._requests[index].answer, "parsed": None, "correct": False}
        if self._routes:
            row["route"] = None
        self._keep(index, row)

    def records(self) -> list[dict[str, Any]]:
        """The rows in the order of the prompts."""
        return [self._rows[index] for index in sorted(self._rows)]

    def _start(self, index: int, output: str, tokens: int) -> dict[str, Any]:
        request = self._requests[index]
        row: dict[str, Any] = {"row": index, "prompt": request.prompt, "output": output, "tokens": tokens}
        named = {"adapter": request.adapter, "group": request.group}
        return row | {field: value for field, value in named.items() if value is not None}

    def _keep(self, index: int, row: dict[str, Any]) -> None:
        if self._path is not None:
            kept = f"; its {len(self._rows)} rows are kept, and the same command resumes after them"
            with writing(self._path, kept):
                append_record(self._path, {**row, "run": self._run})
        self._rows[index] = row

    def _resume(self, path: Path) -> None:
        with writing(path):
            drop_half_line(path)
        try:
            for where, row in read_records(path):
                self._take(row, where)
        except DataError as error:
            raise MiLoraError(f"{error}: {ELSEWHERE}.") from error

    def _take(self, row: dict[str, Any], where: str) -> None:
        index = row.get("row")
        if row.pop("run", None) != self._run:
            raise MiLoraError(f"{where} is of a run with another adapter, backbone or settings: {ELSEWHERE}.")
        if not isinstance(index, int) or index < 0:
            raise MiLoraError(f"{where} is for another prompt than these: {ELSEWHERE}.")
        if index >= len(self._requests):
            # An earlier run had more rows. They stay in the file and do not count here.
            return
        request = self._requests[index]
        expected = request.prompt, request.answer, request.adapter
        if (row.get("prompt"), row.get("answer"), row.get("adapter")) != expected:
            raise MiLoraError(f"{where} is for another prompt than these: {ELSEWHERE}.")
        self._rows[index] = row


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of predictions, in the order of the prompts. A run may still be writing the file.

    Raises:
        DataError: There is no such file, or a line is not a row.
    """
    return sorted((row for _, row in read_records(path)), key=lambda row: row.get("row", 0))


def _same(output: str, answer: str) -> bool:
    return output.strip() == answer.strip()
