"""A model's answers to MT-Bench, in FastChat's format."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from milora.evaluation.accuracy import has_room
from milora.evaluation.compact_routes import compact_route
from milora.evaluation.fingerprint import model_fingerprint, run_fingerprint
from milora.evaluation.progress import Watch
from milora.inference.generation import Decoding, generate_texts
from milora.records import append_record, drop_half_line, read_records
from milora.tasks.mt_bench import Question
from milora.tasks.rows import Text, instruction_prompt
from milora_core.errors import DataError, MiLoraError
from milora_core.files import writing

TURNS = 2
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""FastChat's temperatures by category. Other categories are greedy."""

KEPT = "; its answers are kept, and the same command resumes after them"

CompactRoute: TypeAlias = dict[str, list[int]]


@dataclass(frozen=True)
class Answer:
    """A model's answers to the turns of a question.

    Attributes:
        question: Its id.
        model: The model's name.
        turns: The answers.
        run: A digest of model, question, decoding and seed; `None` for answers of other programs.
        no_room: The numbers of the turns, from 1, that were skipped because an answer would exceed the backbone's
            positions. Their text is empty.
        routes: The [`compact_route`] of each turn's prompt, `None` if no router was used; empty for answers of other
            programs.
    """

    question: int
    model: str
    turns: tuple[str, ...]
    run: str | None = None
    no_room: tuple[int, ...] = ()
    routes: tuple[CompactRoute | None, ...] = ()


def answer_questions(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    path: Path,
    model_id: str,
    *,
    max_new_tokens: int = 1024,
    beams: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    progress: Watch | None = None,
) -> list[Answer]:
    """Answers both turns of every question and appends each answer to a file in FastChat's format (JSON lines).

    The second turn's prompt is the whole conversation so far. It is a separate prompt with its own route.
    Prompts use the tokenizer's chat template if it has one, else LLM-Adapters' instruction template, repeated for the
    second turn.

    A conversation that exceeds the backbone's positions with `max_new_tokens` new tokens is skipped, not truncated. Its
    answer is empty, and this turn and later turns are in `no_room`.

    A line has FastChat's fields and the further fields `run`, `routes` and, if turns were skipped, `no_room`, which
    FastChat ignores; see [`Answer`].

    Args:
        model: A causal language model, with or without an adapter.
        tokenizer: The model's tokenizer.
        questions: The questions.
        path: The file. Answers in it are not generated again.
        model_id: The model's name in the file.
        max_new_tokens: Maximum length of an answer.
        beams: Number of beams for every category. `None` samples at FastChat's temperatures (greedy at 0).
        seed: Seed of sampling.
        batch_size: Maximum number of prompts per batch.
        progress: Shows progress, one step per batch.

    Returns:
        The answers in the questions' order.

    Raises:
        DataError: If the file has answers of another model, with other weights, decoding or seed, or to a changed
            question, or is not a file of answers.
        MiLoraError: If the file cannot be written, or the GPU runs out of memory.
    """
    with writing(path):
        drop_half_line(path)
    made_with = _runs(model, questions, max_new_tokens, beams, seed)
    done = {answer.question: answer for answer in read_answers(path, questions)} if path.exists() else {}
    _check_origin(done.values(), path, model_id, made_with)
    missing = [question for question in questions if question.id not in done]
    torch.manual_seed(seed)
    # Each batch runs through both turns, so an interruption loses at most one batch.
    groups = list(_batches(missing, batch_size))
    for group in progress(groups, "MT-Bench", len(groups)) if progress else groups:
        decoding = _decoding(group[0].category, max_new_tokens, beams)
        for conversation in _hold(model, tokenizer, group, decoding, batch_size):
            question = conversation.question.id
            done[question] = conversation.answer(model_id, made_with[question])
            with writing(path, KEPT):
                append_record(path, _record(done[question]))
    return [done[question.id] for question in questions]


def read_answers(path: Path, questions: Sequence[Question]) -> list[Answer]:
    """The answers to questions in a file in FastChat's format. The last answer to a question counts.

    Raises:
        DataError: If there is no such file, or a line is not an answer of two turns.
    """
    wanted = {question.id for question in questions}
    answers: dict[int, Answer] = {}
    for where, record in read_records(path):
        try:
            answer = Answer(
                int(record["question_id"]),
                str(record["model_id"]),
                tuple(str(turn) for turn in record["choices"][0]["turns"]),
                record.get("run"),
                tuple(int(turn) for turn in record.get("no_room", ())),
                tuple(record.get("routes", ())),
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(f"{where}: no answer in FastChat's format (question_id, model_id, choices)") from error
        if len(answer.turns) != TURNS:
            raise DataError(f"{where}: {len(answer.turns)} turns, MT-Bench has {TURNS}")
        if answer.question in wanted:
            answers[answer.question] = answer
    return list(answers.values())


def read_opponent(path: Path, questions: Sequence[Question]) -> list[Answer]:
    """Another model's answers to all questions, in a file in FastChat's format.

    Raises:
        DataError: As [`read_answers`], or if a question has no answer in the file.
    """
    answers = read_answers(path, questions)
    answered = {answer.question for answer in answers}
    if lacking := [question.id for question in questions if question.id not in answered]:
        raise DataError(
            f"{path} has no answer to question {lacking[0]}, and to {len(lacking)} of the {len(questions)} questions "
            "in all: compare with a file that answers each of them, or ask fewer with --limit."
        )
    return answers


@dataclass
class _Conversation:
    """A question while it is being answered, turn by turn."""

    question: Question
    said: list[str] = field(default_factory=list)
    routes: list[CompactRoute | None] = field(default_factory=list)
    no_room: list[int] = field(default_factory=list)

    def add(self, text: str, route: CompactRoute | None) -> None:
        self.said.append(text)
        self.routes.append(route)

    def add_without_room(self) -> None:
        self.add("", None)
        self.no_room.append(len(self.said))

    def answer(self, model_id: str, run: str) -> Answer:
        return Answer(self.question.id, model_id, tuple(self.said), run, tuple(self.no_room), tuple(self.routes))


def _hold(
    model: Any, tokenizer: Any, questions: Sequence[Question], decoding: Decoding, batch_size: int
) -> list[_Conversation]:
    """Answers all turns of a batch of conversations."""
    conversations = [_Conversation(question) for question in questions]
    for turn in range(TURNS):
        asked: list[_Conversation] = []
        prompts: list[Text] = []
        for conversation in conversations:
            # Without the first answer there is no conversation to continue.
            if not conversation.no_room:
                prompt = conversation_prompt(tokenizer, conversation.question.turns[: turn + 1], conversation.said)
                if has_room(model, tokenizer, prompt, decoding.max_new_tokens):
                    asked.append(conversation)
                    prompts.append(prompt)
                    continue
            conversation.add_without_room()
        for text in generate_texts(model, tokenizer, prompts, decoding, batch_size=batch_size):
            asked[text.index].add(text.text.strip(), None if text.route is None else compact_route(text.route))
    return conversations


def _record(answer: Answer) -> dict[str, Any]:
    return {
        "question_id": answer.question,
        "answer_id": uuid.uuid4().hex,
        "model_id": answer.model,
        "choices": [{"index": 0, "turns": list(answer.turns)}],
        "tstamp": time.time(),
        "run": answer.run,
        "routes": list(answer.routes),
        **({"no_room": list(answer.no_room)} if answer.no_room else {}),
    }


def _runs(
    model: Any, questions: Sequence[Question], max_new_tokens: int, beams: int | None, seed: int
) -> dict[int, str]:
    """The digest of each question's run. An answer with the same digest is reused."""
    weights = model_fingerprint(model)
    runs = {}
    for question in questions:
        decoding = _decoding(question.category, max_new_tokens, beams)
        settings = {
            "turns": question.turns,
            "decoding": asdict(decoding),
            "seed": seed if decoding.samples else None,
        }
        runs[question.id] = run_fingerprint(settings, weights)
    return runs


def _check_origin(answers: Iterable[Answer], path: Path, model_id: str, runs: Mapping[int, str]) -> None:
    for answer in answers:
        if answer.model != model_id:
            raise DataError(f"{path} holds answers of {answer.model!r}, not of {model_id!r}: name another file.")
        if answer.run not in (None, runs[answer.question]):
            raise DataError(
                f"{path}, question {answer.question}: the answer of {model_id!r} was given with other weights or other "
                "decoding, from another seed, or to other words of the question: name another folder or another model "
                "id, or remove the file."
            )


def _batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Batches of questions of one category, which share a temperature."""
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
    """The prompt of a turn: the conversation so far, in the chat template or the instruction template.

    Args:
        tokenizer: The model's tokenizer.
        asked: The user's turns so far.
        said: The answers to all turns except the last.
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
