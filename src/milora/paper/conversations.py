"""MT-Bench in a run: the routes of its first turns, and where there is a judge, the grade of its conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from milora.backbone.positions import positions_of
from milora.evaluation.mt_bench.answers import TURNS, conversation_prompt
from milora.evaluation.routes import compact_route
from milora.evaluation.run import EvaluationSettings, evaluate
from milora.inference.generation import encode_prompt
from milora.inference.routing import route_prompts
from milora.paper.materials import Materials
from milora.paper.runs import Run, UnfinishedRunError
from milora.tasks.mt_bench import MtBench, Question
from milora_core.errors import MiLoraError


def first_turn_routes(
    model: Any, tokenizer: Any, questions: Sequence[Question], batch_size: int
) -> list[dict[str, Any]]:
    """The route of each question's first turn, as rows of predictions have it, without an answer being generated.

    Questions that are longer than the backbone has positions are left out.
    """
    positions = positions_of(model)
    prompts = [conversation_prompt(tokenizer, question.turns[:1], ()) for question in questions]
    fitting = [prompt for prompt in prompts if positions is None or len(encode_prompt(tokenizer, prompt)) <= positions]
    if not fitting:
        return []
    routes = route_prompts(model, tokenizer, fitting, batch_size)
    return [{"route": compact_route(routes, row)} for row in range(len(fitting))]


def graded_conversations(run: Run, model: Any, tokenizer: Any, folder: Path, materials: Materials) -> dict[str, Any]:
    """Holds MT-Bench's conversations and has them graded, as `milora evaluate --task mt-bench --judge-url` does.

    Args:
        run: Whose adapter it is; its seed is that of the drawn tokens.
        model: The backbone with the run's adapter.
        tokenizer: The model's.
        folder: For answers and judgements; those that it has are neither made nor asked for again.
        materials: The questions and the judge.

    Returns:
        For the record: `score` (the mean grade, of 10), `rows` (turns), `no_room` (of these, turns without room for an
        answer), `ungraded` (judgements in which there is no grade), `unparsed` (0: every answer is judged), `judge`,
        `prompts`, `turns` and `categories` (means).

    Raises:
        UnfinishedRunError: If the judge could not be had for all turns; the answers are in the folder.
        MiLoraError: If the answers cannot be made.
    """
    task, judging = MtBench(materials.data_dir), materials.judging
    settings = EvaluationSettings(
        seed=run.seed,
        batch_size=run.evaluation["batch_size"],
        output_dir=folder,
        judging=replace(judging, url=None),
    )
    evaluate(model, tokenizer, task, settings)
    try:
        # The answers are there: what goes wrong now is the judge's.
        found = evaluate(model, tokenizer, task, replace(settings, judging=judging))
    except MiLoraError as error:
        raise UnfinishedRunError(str(error)) from error
    if found["failed"]:
        raise UnfinishedRunError(f"{found['failed']} judgements could not be had: {found['reason']}")
    return {
        "score": found["score"],
        "rows": TURNS * found["questions"],
        "no_room": found["no_room"],
        "unparsed": 0,
        "ungraded": found["unparsed"],
        **{name: found[name] for name in ("judge", "prompts", "turns", "categories")},
    }
