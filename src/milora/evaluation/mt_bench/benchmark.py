"""Runs MT-Bench: answers, judgements and scores, each in a file from which a later run resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from milora.evaluation.mt_bench import grades, judge_prompts, judging
from milora.evaluation.mt_bench.model_answers import Answer, answer_questions, read_opponent
from milora.evaluation.progress import Watch
from milora.tasks.mt_bench import Question
from milora_core.errors import MiLoraError


def answers_file(folder: Path, model_id: str) -> Path:
    """The file of a model's answers, as in FastChat's `data/mt_bench`."""
    return folder / "model_answer" / f"{_file_name(model_id)}.jsonl"


def run(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    folder: Path,
    model_id: str,
    *,
    judge: judging.Judge | None = None,
    opponent: Path | None = None,
    prompts_folder: Path | None = None,
    workers: int = 4,
    progress: Watch | None = None,
    **generation: Any,
) -> dict[str, Any]:
    """Generates answers to the questions and, with a judge, grades them.

    The folder has the layout of FastChat's `data/mt_bench`: `model_answer/{model}.jsonl`,
    `model_judgment/{judge}_single.jsonl` and `model_judgment/{judge}_pair.jsonl`.

    Args:
        model: A causal language model, with or without an adapter.
        tokenizer: The model's tokenizer.
        questions: The questions.
        folder: The output folder. Existing answers and judgements are reused.
        model_id: The model's name in the files.
        judge: Grades the answers. With `None` they are not graded.
        opponent: A file of another model's answers to compare with.
        prompts_folder: The folder that may have FastChat's `judge_prompts.jsonl`.
        workers: Number of concurrent requests to the judge.
        progress: Shows progress.
        **generation: `max_new_tokens`, `beams`, `seed` and `batch_size` of
            [`milora.evaluation.mt_bench.model_answers.answer_questions`].

    Returns:
        `model`, `questions` (their number), `answers` (the file), `answers_digest` (of the texts), `no_room` (the
        number of turns skipped because an answer would exceed the backbone's positions). With a judge also `judge`,
        `prompts` ("fastchat" or "own"), `failed`, `reason`, and the fields of
        [`milora.evaluation.mt_bench.grades.grades`]. With an opponent also `pairwise`, with similar fields.

    Raises:
        MiLoraError: If there is an opponent and no judge, or grading failed for all answers.
        DataError: If the opponent's file lacks an answer, or one of the files cannot be read.
    """
    if opponent is not None and judge is None:
        raise MiLoraError("A comparison with another model's answers needs a judge: pass --judge-url.")
    others = None if opponent is None else read_opponent(opponent, questions)
    path = answers_file(folder, model_id)
    answers = answer_questions(model, tokenizer, questions, path, model_id, progress=progress, **generation)
    result: dict[str, Any] = {
        "model": model_id,
        "questions": len(questions),
        "answers": str(path),
        "answers_digest": _digest(answers),
        "no_room": sum(len(answer.no_room) for answer in answers),
    }
    if judge is None:
        return result
    wording = judge_prompts.load(prompts_folder)
    judgements = folder / "model_judgment" / _file_name(judge.model)
    single = judging.JudgeRun(
        judge, wording, judgements.with_name(f"{judgements.name}_single.jsonl"), workers, progress
    )
    graded = judging.grade(single, questions, answers)
    if graded.failed and not graded.records:
        raise MiLoraError(f"All judgements failed. {graded.reason} The answers are kept.")
    own = all(wording[name] == prompt for name, prompt in judge_prompts.OWN.items())
    judged_by = {"judge": judge.model, "prompts": "own" if own else "fastchat"}
    result |= {
        **judged_by,
        "failed": graded.failed,
        "reason": graded.reason,
        **grades.grades(graded.records, questions),
    }
    if others is not None:
        pair = replace(single, path=judgements.with_name(f"{judgements.name}_pair.jsonl"))
        compared = judging.compare(pair, questions, answers, others)
        result["pairwise"] = {
            "opponent": others[0].model,
            **judged_by,
            "failed": compared.failed,
            "reason": compared.reason,
            **grades.wins(compared.records),
        }
    return result


def _digest(answers: Sequence[Answer]) -> str:
    texts = json.dumps([answer.turns for answer in answers])
    return hashlib.blake2b(texts.encode(), digest_size=8).hexdigest()


def _file_name(name: str) -> str:
    return name.replace("/", "--")
