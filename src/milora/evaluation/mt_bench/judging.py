"""Judgements of answers: single answers graded, or two models' answers compared."""

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
"""The grade of a judgement that gives none, as FastChat writes it."""

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
        records: The judgements in FastChat's format, those of earlier runs included.
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
        prompts: What it is asked, by name; see [`milora.evaluation.mt_bench.judge_prompts.load`].
        path: JSON lines as FastChat's `gpt-4_single.jsonl` or `gpt-4_pair.jsonl`, to which judgements are appended as
            they come: what it holds of the same answers, judge and prompts is not asked again.
        workers: How many requests are made at a time.
        progress: Shows progress, a judgement a step.
    """

    judge: Judge
    prompts: Mapping[str, JudgePrompt]
    path: Path
    workers: int = 4
    progress: Watch | None = None


def parse_rating(judgement: str) -> float:
    """The grade from 1 to 10 that a judgement gives as `[[7]]` (or `[7]`), `UNPARSED` if it gives none."""
    for pattern in _RATING:
        if match := pattern.search(judgement):
            rating = float(match[1])
            return rating if 1 <= rating <= 10 else UNPARSED
    return UNPARSED


def parse_verdict(judgement: str) -> str | None:
    """`A`, `B` or `C` (a tie) as a judgement gives it, `None` if it gives none or several different ones."""
    found = set(_VERDICT.findall(judgement))
    return found.pop() if len(found) == 1 else None


def grade(run: JudgeRun, questions: Sequence[Question], answers: Sequence[Answer]) -> Outcome:
    """Grades every turn of every answer.

    The judge is not asked about a turn without room for an answer: it has the lowest grade, 1, in a record like others,
    so that FastChat's own means count it too.

    Args:
        run: Who grades, and where the grades go.
        questions: What was asked.
        answers: What was answered, by one model.

    Raises:
        DataError: If a prompt has a place that cannot be filled, or the file is no file of judgements.
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
    """Compares the answers of two models, each pair twice with the positions swapped, as FastChat does.

    The judge is not asked about turns without room for an answer: such a turn loses against one with an answer, and two
    of them are a tie.

    Args:
        run: Who compares, and where the verdicts go.
        questions: What was asked.
        answers: The first model's (`model_1`).
        others: The second model's, of the same questions.

    Raises:
        DataError: If a question has an answer of one model only, a prompt has a place that cannot be filled, or the
            file is no file of judgements.
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
        about: What its record says besides: of what, and by whom.
        messages: What the judge is sent, by the beginning of the names of the fields that its reply goes to.
        replies: What stands in the place of its reply where there is nothing to judge.
    """

    about: dict[str, Any]
    messages: dict[str, list[dict[str, str]]]
    replies: dict[str, str]

    def is_answered_by(self, record: dict[str, Any]) -> bool:
        """Whether a record is of this judgement, and of the same answers and prompt: both may have been made anew."""
        asked = {f"{game}user_prompt": messages[1]["content"] for game, messages in self.messages.items()}
        return all(record.get(name) == value for name, value in {**self.about, **asked}.items())


def _have(jobs: Sequence[_Job], run: JudgeRun, read: Callable[[str, str], dict[str, Any]]) -> Outcome:
    """Does what is not in the file yet. A failure stops no other job, and is tried again by the next run."""
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
    """What `ask` returns or raises for each index, as it comes; none is begun after the iterator was closed.

    The threads are daemons, which a `ThreadPoolExecutor` has not: an interruption does not wait for requests that are
    under way, each of which may take minutes.
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
    """By the job's place, the records of a file that are of one of the jobs, the last one where there are several."""
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
    """The verdict on a pair of which one or both left no room for an answer, `None` where both have one."""
    empty = {side for side, answer in sides.items() if turn in answer.no_room}
    if not empty:
        return None
    verdict = "C" if len(empty) == 2 else "B" if "_a" in empty else "A"
    return f"{NO_ANSWER} [[{verdict}]]"


def _parts(question: Question, turn: int, sides: dict[str, Answer]) -> dict[str, str]:
    """What fills a prompt's places: everything up to the turn."""
    parts = {f"ref_answer_{number}": text for number, text in enumerate(question.references[:turn], start=1)}
    if turn == 1:
        parts["question"] = question.turns[0]
        parts |= {f"answer{side}": answer.turns[0] for side, answer in sides.items()}
        return parts
    for number in range(1, TURNS + 1):
        parts[f"question_{number}"] = question.turns[number - 1]
        parts |= {f"answer{side}_{number}": answer.turns[number - 1] for side, answer in sides.items()}
    return parts
