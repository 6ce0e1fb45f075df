"""Predictions: generated texts, judged and written as they come, in a file that a later run resumes."""

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
        prompt: What the model reads.
        answer: The gold answer, where there is one.
        adapter: The adapter that is to answer, where several could.
        group: The part of the task that the row belongs to (MMLU's subject), where it has parts.
    """

    prompt: Text
    answer: str | None = None
    adapter: str | None = None
    group: str | None = None


class Predictions:
    """The rows of a run, in a file of JSON lines if one is given, where a later run finds what is done.

    A row has `row` (the request's place), `prompt`, `output`, `tokens`; where they apply `adapter` and `group`; where
    there is a gold answer `answer`, `parsed` (null where the output gives no answer) and `correct`; with `routes`,
    `route` (see [`compact_route`], null where no router was asked). In the file, `run` says which run it is of. Rows
    beyond the last prompt, of a run over more of them, stay in the file and are passed over.

    Args:
        requests: The prompts.
        task: Reads the answers; without one, an output is compared with the answer as a whole.
        path: The file, or `None`.
        run: What the rows of this run are marked with, so that those of another adapter are not taken for its own.
        routes: Whether rows tell their route.

    Raises:
        MiLoraError: If the file has rows of other prompts or of another run, or its folder cannot be made.
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
            # A device or a pipe can be written to, but has nothing to resume.
            if path.is_file():
                self._resume(path)

    @property
    def path(self) -> Path | None:
        """The file."""
        return self._path

    def missing(self) -> list[int]:
        """The prompts that have no row yet."""
        return [index for index in range(len(self._requests)) if index not in self._rows]

    def add(self, index: int, text: GeneratedText) -> None:
        """Judges a text, and writes its row at once: what is done survives an interruption.

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
        """Writes the row of a prompt that was not given to the model, as it leaves no room for an answer: it is wrong.

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
            # Of an earlier run over more rows: theirs to keep, none of ours to count.
            return
        request = self._requests[index]
        expected = request.prompt, request.answer, request.adapter
        if (row.get("prompt"), row.get("answer"), row.get("adapter")) != expected:
            raise MiLoraError(f"{where} is for another prompt than these: {ELSEWHERE}.")
        self._rows[index] = row


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of predictions in the order of the prompts; the file may still be written to.

    Raises:
        DataError: There is no such file, or a line is no row.
    """
    return sorted((row for _, row in read_records(path)), key=lambda row: row.get("row", 0))


def _same(output: str, answer: str) -> bool:
    return output.strip() == answer.strip()
