"""Judges answers: grades single answers or compares two models' answers."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from milora.evaluation.mt_bench.judge_prompts import JudgePrompt, name_of
from milora.evaluation.mt_bench.model_answers import KEPT, TURNS, Answer
from milora.evaluation.progress import Watch
from milora.records import append_record, drop_half_line, read_records
from milora.tasks.mt_bench import Question
from milora_core.errors import DataError, MiLoraError
from milora_core.files import writing

UNPARSED = -1
"""The grade of a judgement without a grade, as in FastChat."""

_RATING = (re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]"), re.compile(r"\[(\d+(?:\.\d+)?)\]"))
_VERDICT = re.compile(r"\[\[([ABC])\]\]")
NO_ANSWER = "There is no answer to judge: the conversation exceeds the backbone's positions."
MAX_TOKENS = 2048
TURN_NUMBERS = range(1, TURNS + 1)


class Judge(Protocol):
    """Replies to a conversation, such as [`milora.evaluation.mt_bench.client.ChatEndpoint`]."""

    model: str

    def complete(self, messages: Sequence[Any], *, temperature: float, max_tokens: int) -> str:
        """The reply."""


@dataclass(frozen=True)
class Outcome:
    """The result of a set of judgements.

    Attributes:
        records: The judgements in FastChat's format, including those of earlier runs.
        failed: The number of failed judgements.
        reason: The reason of the first failure.
    """

    records: list[dict[str, Any]]
    failed: int
    reason: str | None


@dataclass(frozen=True)
class JudgeRun:
    """The judge, its prompts, and the file of judgements.

    Attributes:
        judge: The judge.
        prompts: The judge's prompts by name; see [`milora.evaluation.mt_bench.judge_prompts.load`].
        path: JSON lines like FastChat's `gpt-4_single.jsonl` or `gpt-4_pair.jsonl`. Each judgement is appended
            immediately. Judgements in the file of the same answers, judge and prompts are reused.
        workers: Number of concurrent requests.
        progress: Shows progress, one step per judgement.
    """

    judge: Judge
    prompts: Mapping[str, JudgePrompt]
    path: Path
    workers: int = 4
    progress: Watch | None = None


def parse_rating(judgement: str) -> float:
    """The grade from 1 to 10 in a judgement, as `[[7]]` (or `[7]`), or `UNPARSED` if there is none."""
    for pattern in _RATING:
        if match := pattern.search(judgement):
            rating = float(match[1])
            return rating if 1 <= rating <= 10 else UNPARSED
    return UNPARSED


def parse_verdict(judgement: str) -> str | None:
    """The verdict of a judgement, `A`, `B` or `C` (a tie), or `None` if it has none or several different ones."""
    found = set(_VERDICT.findall(judgement))
    return found.pop() if len(found) == 1 else None


def grade(run: JudgeRun, questions: Sequence[Question], answers: Sequence[Answer]) -> Outcome:
    """Grades every turn of every answer.

    A turn that was skipped because an answer would exceed the backbone's positions gets the lowest grade, 1, without a
    request to the judge. Its record looks like the others, so FastChat's means include it.

    Args:
        run: The judge and the file of judgements.
        questions: The questions.
        answers: The answers of one model.

    Raises:
        DataError: If a prompt has an unknown placeholder, or the file is not a file of judgements.
        MiLoraError: If a judgement cannot be written.
    """
    asked = {question.id: question for question in questions}
    jobs = []
    for answer in answers:
        for turn in TURN_NUMBERS:
            question = asked[answer.question]
            prompt = _prompt_for("single", question, turn, run.prompts)
            about = {
                "question_id": question.id,
                "model": answer.model,
                "judge": [run.judge.model, prompt.name],
                "turn": turn,
            }
            replies = {"": f"{NO_ANSWER} Rating: [[1]]"} if turn in answer.no_room else {}
            jobs.append(_Job(about, {"": prompt.fill(_parts(question, turn, {"": answer}))}, replies))
    return _have(jobs, run, lambda _, judgement: {"score": parse_rating(judgement)})


def compare(
    run: JudgeRun, questions: Sequence[Question], answers: Sequence[Answer], others: Sequence[Answer]
) -> Outcome:
    """Compares the answers of two models, each pair twice with the positions swapped, as in FastChat.

    Turns that were skipped because an answer would exceed the backbone's positions are decided without the judge: a
    skipped turn loses against an answer, and two skipped turns are a tie.

    Args:
        run: The judge and the file of judgements.
        questions: The questions.
        answers: The first model's answers (`model_1`).
        others: The second model's answers to the same questions.

    Raises:
        DataError: If a question has an answer of only one model, a prompt has an unknown placeholder, or the file is
            not a file of judgements.
        MiLoraError: If a judgement cannot be written.
    """
    asked = {question.id: question for question in questions}
    second = {answer.question: answer for answer in others}
    if lacking := sorted({answer.question for answer in answers} ^ set(second)):
        raise DataError(f"MT-Bench question {lacking[0]} has an answer of only one of the two models.")

    def winner(game: str, judgement: str) -> dict[str, Any]:
        names = {"A": "model_1", "B": "model_2"} if game == "g1_" else {"A": "model_2", "B": "model_1"}
        verdict = parse_verdict(judgement)
        return {"winner": "error" if verdict is None else names.get(verdict, "tie")}

    jobs = []
    for answer in answers:
        for turn in TURN_NUMBERS:
            question, other = asked[answer.question], second[answer.question]
            prompt = _prompt_for("pair", question, turn, run.prompts)
            about = {
                "question_id": question.id,
                "model_1": answer.model,
                "model_2": other.model,
                "judge": [run.judge.model, prompt.name],
                "turn": turn,
            }
            places = {"g1_": {"_a": answer, "_b": other}, "g2_": {"_a": other, "_b": answer}}
            messages = {game: prompt.fill(_parts(question, turn, sides)) for game, sides in places.items()}
            replies = {game: reply for game, sides in places.items() if (reply := _reply_without_room(sides, turn))}
            jobs.append(_Job(about, messages, replies))
    return _have(jobs, run, winner)


@dataclass(frozen=True)
class _Job:
    """A pending judgement.

    Attributes:
        about: The fields of its record that identify the judged answers and the judge.
        messages: The messages to the judge, by the prefix of the record's fields for its reply.
        replies: Fixed replies that replace the judge's if there is nothing to judge.
    """

    about: dict[str, Any]
    messages: dict[str, list[dict[str, str]]]
    replies: dict[str, str]

    def is_answered_by(self, record: dict[str, Any]) -> bool:
        """Whether a record has this judgement, for the same answers and the same prompt."""
        asked = {f"{game}user_prompt": messages[1]["content"] for game, messages in self.messages.items()}
        return all(record.get(name) == value for name, value in {**self.about, **asked}.items())


def _have(jobs: Sequence[_Job], run: JudgeRun, read: Callable[[str, str], dict[str, Any]]) -> Outcome:
    """Runs the jobs that are not in the file. A failed job does not stop others, and the next run retries it."""
    with writing(run.path):
        drop_half_line(run.path)
    done = _known(jobs, run.path)

    def ask(index: int) -> dict[str, Any]:
        job = jobs[index]
        record = dict(job.about)
        for game, messages in job.messages.items():
            judgement = job.replies.get(game) or run.judge.complete(messages, temperature=0, max_tokens=MAX_TOKENS)
            fields = {"user_prompt": messages[1]["content"], "judgment": judgement, **read(game, judgement)}
            record |= {f"{game}{name}": value for name, value in fields.items()}
        return {**record, "tstamp": time.time()}

    failed, reason = 0, None
    remaining = [index for index in range(len(jobs)) if index not in done]
    with closing(_in_threads(ask, remaining, max(run.workers, 1))) as coming:
        for index, outcome in run.progress(coming, "judgements", len(remaining)) if run.progress else coming:
            if isinstance(outcome, MiLoraError):
                failed, reason = failed + 1, reason or str(outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                with writing(run.path, KEPT):
                    append_record(run.path, outcome)
                done[index] = outcome
    return Outcome([done[index] for index in range(len(jobs)) if index in done], failed, reason)


def _in_threads(
    ask: Callable[[int], dict[str, Any]], indices: Sequence[int], workers: int
) -> Generator[tuple[int, dict[str, Any] | BaseException], None, None]:
    """Yields the result or the error of `ask` for each index on completion. Closing the iterator starts no more calls.

    The threads are daemons, unlike those of a `ThreadPoolExecutor`, so an interruption does not wait for running
    requests, which may take minutes.
    """
    waiting: SimpleQueue[int] = SimpleQueue()
    coming: SimpleQueue[tuple[int, dict[str, Any] | BaseException]] = SimpleQueue()
    closed = threading.Event()
    for index in indices:
        waiting.put(index)

    def work() -> None:
        while not closed.is_set():
            try:
                index = waiting.get_nowait()
            except Empty:
                return
            try:
                outcome: dict[str, Any] | BaseException = ask(index)
            except BaseException as error:
                outcome = error
            coming.put((index, outcome))

    try:
        for _ in range(min(workers, len(indices))):
            threading.Thread(target=work, daemon=True).start()
        for _ in indices:
            yield coming.get()
    finally:
        closed.set()


def _known(jobs: Sequence[_Job], path: Path) -> dict[int, dict[str, Any]]:
    """The records in a file that belong to the jobs, by the job's index. The last record of a job counts."""
    by_identity = {_identity(job.about): index for index, job in enumerate(jobs)}
    known: dict[int, dict[str, Any]] = {}
    for where, record in read_records(path) if path.exists() else ():
        if jobs and not jobs[0].about.keys() <= record.keys():
            raise DataError(f"{where}: no judgement of this kind in FastChat's format")
        index = by_identity.get(_identity({name: record[name] for name in jobs[0].about})) if jobs else None
        if index is not None and jobs[index].is_answered_by(record):
            known[index] = record
    return known


def _identity(about: dict[str, Any]) -> str:
    return json.dumps(about, sort_keys=True)


def _prompt_for(kind: str, question: Question, turn: int, prompts: Mapping[str, JudgePrompt]) -> JudgePrompt:
    name = name_of(kind, with_reference=len(question.references) >= turn, second_turn=turn == TURNS)
    if name not in prompts:
        raise DataError(f"There is no judge prompt {name!r}; there are {', '.join(sorted(prompts))}.")
    return prompts[name]


def _reply_without_room(sides: Mapping[str, Answer], turn: int) -> str | None:
    """The fixed verdict on a pair with one or two skipped turns, or `None` if both turns have an answer."""
    empty = {side for side, answer in sides.items() if turn in answer.no_room}
    if not empty:
        return None
    verdict = "C" if len(empty) == 2 else "B" if "_a" in empty else "A"
    return f"{NO_ANSWER} [[{verdict}]]"


def _parts(question: Question, turn: int, sides: dict[str, Answer]) -> dict[str, str]:
    """The values of a prompt's placeholders, up to the turn."""
    parts = {f"ref_answer_{number}": text for number, text in enumerate(question.references[:turn], start=1)}
    if turn == 1:
        parts["question"] = question.turns[0]
        parts |= {f"answer{side}": answer.turns[0] for side, answer in sides.items()}
        return parts
    for number in range(1, TURNS + 1):
        parts[f"question_{number}"] = question.turns[number - 1]
        parts |= {f"answer{side}_{number}": answer.turns[number - 1] for side, answer in sides.items()}
    return parts
