"""A model's answers to MT-Bench, in FastChat's format."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora.errors import DataError, MiLoraError
from milora.evaluation.fingerprint import model_fingerprint
from milora.evaluation.progress import Watch
from milora.files import writing
from milora.inference.generation import Decoding, generate_texts
from milora.records import append_record, drop_half_line, read_records
from milora.tasks.mt_bench import Question
from milora.tasks.rows import Text, instruction_prompt

TURNS = 2
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""By category, as FastChat has them; greedy for the others."""

KEPT = "; what is in it is kept: make room, and run the same again to go on"


@dataclass(frozen=True)
class Answer:
    """A model's answers to the turns of a question.

    Attributes:
        question: Its id.
        model: The model's name.
        turns: The answers.
        run: What they were made with, model and decoding, in a digest; `None` for those of other programs.
    """

    question: int
    model: str
    turns: tuple[str, ...]
    run: str | None = None


def answer_questions(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    path: Path,
    model_id: str,
    *,
    max_new_tokens: int = 1024,
    beams: int | None = None,
    batch_size: int = 8,
    progress: Watch | None = None,
) -> list[Answer]:
    """Answers both turns of every question, and writes them to a file of JSON lines as FastChat's, as they are done.

    The second turn's prompt is the whole conversation so far. It is a prompt of its own: a router decides on it anew.
    Prompts are the tokenizer's chat template if it has one, else LLM-Adapters' instruction template, which is repeated
    for the second turn.

    Args:
        model: A causal language model, with an adapter or without.
        tokenizer: The model's.
        questions: What to answer.
        path: The file; answers that it holds already are not made again.
        model_id: The model's name in the file.
        max_new_tokens: Length at which an answer is cut.
        beams: Beam search for every category; `None` draws at FastChat's temperatures, greedily where they are 0.
        batch_size: The most prompts a batch.
        progress: Shows progress, a batch a step.

    Returns:
        The answers in the questions' order.

    Raises:
        DataError: If the file holds answers of another model, or of this name's with other weights or decoding, or is
            no file of answers.
        MiLoraError: If a conversation does not fit the model with `max_new_tokens` to come, or the file cannot be
            written.
    """
    with writing(path):
        drop_half_line(path)
    made_with = _run(model, max_new_tokens, beams)
    done = {answer.question: answer for answer in read_answers(path, questions)} if path.exists() else {}
    strangers = {answer.model for answer in done.values()} - {model_id}
    if strangers:
        raise DataError(f"{path} holds answers of {sorted(strangers)[0]!r}, not of {model_id!r}: name another file.")
    if any(answer.run not in (None, made_with) for answer in done.values()):
        raise DataError(
            f"{path} holds answers of {model_id!r} with other weights or other decoding: name another folder or "
            "another model id, or remove the file."
        )
    missing = [question for question in questions if question.id not in done]
    # A batch at a time through both turns, so that an interruption costs no more than a batch.
    groups = list(_batches(missing, batch_size))
    for group in progress(groups, "MT-Bench", len(groups)) if progress else groups:
        conversations: list[list[str]] = [[] for _ in group]
        for turn in range(TURNS):
            prompts = [
                conversation_prompt(tokenizer, q.turns[: turn + 1], said) for q, said in zip(group, conversations, strict=True)
            ]
            decoding = _decoding(group[0].category, max_new_tokens, beams)
            for text in generate_texts(model, tokenizer, prompts, decoding, batch_size=batch_size):
                conversations[text.index].append(text.text.strip())
        for question, said in zip(group, conversations, strict=True):
            done[question.id] = Answer(question.id, model_id, tuple(said), made_with)
            with writing(path, KEPT):
                append_record(path, _record(done[question.id]))
    return [done[question.id] for question in questions]


def read_answers(path: Path, questions: Sequence[Question]) -> list[Answer]:
    """The answers in a file of FastChat's format to some questions; the last one counts where there are several.

    Raises:
        DataError: If there is no such file, or a line is not an answer of two turns.
    """
    wanted = {question.id for question in questions}
    answers: dict[int, Answer] = {}
    for where, record in read_records(path):
        try:
            turns = tuple(str(turn) for turn in record["choices"][0]["turns"])
            answer = Answer(int(record["question_id"]), str(record["model_id"]), turns, record.get("run"))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(f"{where}: no answer in FastChat's format (question_id, model_id, choices)") from error
        if len(answer.turns) != TURNS:
            raise DataError(f"{where}: {len(answer.turns)} turns, MT-Bench has {TURNS}")
        if answer.question in wanted:
            answers[answer.question] = answer
    return list(answers.values())


def _record(answer: Answer) -> dict[str, Any]:
    return {
        "question_id": answer.question,
        "answer_id": uuid.uuid4().hex,
        "model_id": answer.model,
        "choices": [{"index": 0, "turns": list(answer.turns)}],
        "tstamp": time.time(),
        "run": answer.run,
    }


def _run(model: Any, max_new_tokens: int, beams: int | None) -> str:
    settings = json.dumps([model_fingerprint(model), max_new_tokens, beams])
    return hashlib.blake2b(settings.encode(), digest_size=8).hexdigest()


def _batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Of one category each, which share a temperature."""
    if size < 1:
        raise MiLoraError(f"batch_size must be at least 1; found {size}.")
    for category in dict.fromkeys(question.category for question in questions):
        of_category = [question for question in questions if question.category == category]
        for start in range(0, len(of_category), size):
            yield of_category[start : start + size]


def _decoding(category: str, max_new_tokens: int, beams: int | None) -> Decoding:
    if beams is not None:
        return Decoding(max_new_tokens, beams)
    return Decoding(max_new_tokens, beams=1, temperature=TEMPERATURES.get(category))


def conversation_prompt(tokenizer: Any, asked: Sequence[str], said: Sequence[str]) -> Text:
    """What a model reads in a turn: the conversation so far, in its chat template or the instruction template.

    Args:
        tokenizer: The model's.
        asked: The user's turns so far.
        said: The answers to all of them but the last.
    """
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": asked[0]}]
        for answer, question in zip(said, asked[1:], strict=True):
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        return messages
    text = instruction_prompt(asked[0])
    for answer, question in zip(said, asked[1:], strict=True):
        text += f"{answer}\n\n### Instruction:\n{question}\n\n### Response:\n"
    return text
