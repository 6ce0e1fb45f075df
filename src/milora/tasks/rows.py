"""Rows to train and evaluate on, and strict parsing of the supported row formats.

Three formats are supported, in any container (JSON lines, a JSON array, a dataset's columns):

- `prompt` and `completion`, both strings or both lists of chat messages (TRL's prompt-completion type);
- `messages`, a chat (TRL's conversational type);
- `instruction`, `input` and `output` (LLM-Adapters, Alpaca), formatted with LLM-Adapters' template.

A row may also have an `answer`. Other fields are ignored. A malformed row raises an error and is never repaired: the
failures of a model trained on partial rows are hard to trace back to its data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from milora_core.errors import DataError

Message: TypeAlias = dict[str, str]
"""A chat message: `role` and `content`."""

Text: TypeAlias = str | list[Message]

ROLES = ("system", "developer", "user", "assistant", "tool")

_SHAPES: dict[str, tuple[str, ...]] = {
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "instruction": ("instruction", "output"),
}
_SHAPES_IN_WORDS = "`prompt` and `completion`, or `messages`, or `instruction` and `output`"


@dataclass(frozen=True)
class Row:
    """A prompt, the completion to train on, and an optional gold `answer`.

    `prompt` and `completion` are both strings, or both lists of messages for the tokenizer's chat template.
    """

    prompt: Text
    completion: Text
    answer: str | None = None


def instruction_prompt(instruction: str, context: str = "") -> str:
    """LLM-Adapters' prompt (Hu et al. 2023, after Alpaca) for an instruction and its optional `input`.

    The original source indents the lines of the template by accident. This prompt omits the indentation.
    """
    paired = ", paired with an input that provides further context" if context else ""
    input_section = f"### Input:\n{context}\n\n" if context else ""
    return (
        f"Below is an instruction that describes a task{paired}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{input_section}### Response:\n"
    )


def read_records(records: Iterable[tuple[str, object]], source: str) -> list[Row]:
    """Converts records to rows. Each record comes with its location (`train.jsonl, line 3`).

    A record of `messages` becomes one row per assistant reply. The router decides once per prompt, and each reply has
    its own prompt, so training matches generation. The record's `answer` belongs to the last reply.

    Raises:
        DataError: there is no record; or a record has no supported format (see the module's docstring), an empty prompt
            or completion, or another format than the first record.
    """
    rows: list[Row] = []
    first: tuple[str, str] | None = None
    for where, record in records:
        shape, read = _read_record(record, where)
        first = first or (shape, where)
        if shape != first[0]:
            raise DataError(
                f"{where}: a row of {shape}, but {first[1]} is a row of {first[0]}: keep one kind of row in a source"
            )
        rows.extend(read)
    if not rows:
        raise DataError(f"{source} is empty: it needs at least one row with {_SHAPES_IN_WORDS}")
    return rows


def _read_record(record: object, where: str) -> tuple[str, list[Row]]:
    """The record's format, for messages, and its rows."""
    if not isinstance(record, Mapping):
        raise DataError(
            f"{where}: a row is {json_type(record)}, it must be an object with the fields {_SHAPES_IN_WORDS}"
        )
    shape = _shape(record, where)
    answer = _answer(record.get("answer"), where)
    if shape == "messages":
        return "`messages`", _chat_rows(_messages(record["messages"], "messages", where), answer, where)
    if shape == "instruction":
        instruction = _string(record["instruction"], "instruction", where)
        context = _string(record.get("input") or "", "input", where)
        _refuse_blank(instruction, "instruction", where)  # inside the template it would not be blank
        completion: Text = _string(record["output"], "output", where)
        _refuse_blank(completion, "output", where)
        return "`instruction` and `output`", [Row(instruction_prompt(instruction, context), completion, answer)]
    prompt, completion = (_text(record[field], field, where) for field in ("prompt", "completion"))
    if isinstance(prompt, str) != isinstance(completion, str):
        raise DataError(
            f"{where}: `prompt` is {json_type(prompt)} and `completion` is {json_type(completion)}: "
            "make both strings, or both lists of messages"
        )
    if isinstance(completion, list) and completion[0]["role"] != "assistant":
        raise DataError(
            f"{where}: `completion` starts with a message of {completion[0]['role']!r}, it must be the assistant's"
        )
    _refuse_blank(prompt, "prompt", where)
    _refuse_blank(completion, "completion", where)
    words = "strings" if isinstance(prompt, str) else "messages"
    return f"`prompt` and `completion` as {words}", [Row(prompt, completion, answer)]


def _shape(record: Mapping[Any, Any], where: str) -> str:
    """The format of a record. A record that matches two formats is ambiguous and raises an error."""
    # A dataset stores null in the columns that a row does not use, so null counts as absent.
    present = {field for field, value in record.items() if value is not None}
    complete = [shape for shape, needed in _SHAPES.items() if present.issuperset(needed)]
    if len(complete) == 1:
        return complete[0]
    found = ", ".join(f"`{field}`" if field in present else f"`{field}` (null)" for field in record) or "none"
    if complete:
        raise DataError(f"{where}: two readings are possible; keep only {_SHAPES_IN_WORDS}; fields found: {found}")
    started = [needed for needed in _SHAPES.values() if present.intersection(needed)]
    if len(started) == 1:
        missing = " and ".join(f"`{field}`" for field in started[0] if field not in present)
        raise DataError(f"{where}: {missing} is missing; fields found: {found}")
    raise DataError(f"{where}: a row needs {_SHAPES_IN_WORDS}; fields found: {found}")


def _chat_rows(messages: list[Message], answer: str | None, where: str) -> list[Row]:
    """One row for each assistant reply that follows another message."""
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: the last of `messages` is from {messages[-1]['role']!r}, "
            "so there is no reply to train on: end the chat with an assistant's message"
        )
    replies = [index for index, message in enumerate(messages) if index and message["role"] == "assistant"]
    if not replies:
        raise DataError(f"{where}: `messages` holds a reply without a prompt: put a user's message before it")
    rows = []
    for index in replies:
        prompt, completion = messages[:index], messages[index : index + 1]
        _refuse_blank(prompt, "messages", where)
        _refuse_blank(completion, f"messages[{index}].content", where)
        rows.append(Row(prompt, completion, answer if index == replies[-1] else None))
    return rows


def _text(value: object, field: str, where: str) -> Text:
    return _messages(value, field, where) if isinstance(value, list) else _string(value, field, where)


def _messages(value: object, field: str, where: str) -> list[Message]:
    if not isinstance(value, list):
        raise DataError(f"{where}: `{field}` is {json_type(value)}, it must be a list of messages")
    if not value:
        raise DataError(f"{where}: `{field}` is an empty list, it must hold at least one message")
    return [_message(message, f"{field}[{index}]", where) for index, message in enumerate(value)]


def _message(value: object, field: str, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(
            f"{where}: `{field}` is {json_type(value)}, it must be an object with the fields `role` and `content`"
        )
    fields = {key: item for key, item in value.items() if item is not None}
    if set(fields) != {"role", "content"}:
        # Tool calls and images would be lost silently, so other fields raise an error.
        found = ", ".join(f"`{key}`" for key in fields) or "none"
        raise DataError(f"{where}: `{field}` must have `role` and `content` and nothing else; fields found: {found}")
    role = _string(fields["role"], f"{field}.role", where)
    if role not in ROLES:
        raise DataError(f"{where}: `{field}.role` is {role!r}, it must be one of {', '.join(ROLES)}")
    return {"role": role, "content": _string(fields["content"], f"{field}.content", where)}


def _string(value: object, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: `{field}` is {json_type(value)}, it must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON allows a lone surrogate such as \ud800. Tokenizers fail on it, and their error would not name the row.
        broken = f"\\u{ord(value[error.start]):04x}"
        raise DataError(f"{where}: `{field}` has half of a surrogate pair, {broken}, which is not text") from error
    return value


def _answer(value: object, where: str) -> str | None:
    if isinstance(value, bool | int | float):
        return json.dumps(value)  # `true` and `42` mean "true" and "42"
    return None if value is None else _string(value, "answer", where)


def _refuse_blank(text: Text, field: str, where: str) -> None:
    parts = [text] if isinstance(text, str) else [message["content"] for message in text]
    if not any(part.strip() for part in parts):
        raise DataError(f"{where}: `{field}` is empty")


def json_type(value: object) -> str:
    """The JSON type of a value, in words for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    names = ((str, "a string"), (list, "a list"), (Mapping, "an object"))
    return next((name for kind, name in names if isinstance(value, kind)), f"of the type {type(value).__name__}")
