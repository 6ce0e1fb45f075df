"""The tests of a run's adapter: accuracy by task, MT-Bench, and the routers' choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora.backbone.positions import positions_of
from milora.evaluation.accuracy import evaluate_task
from milora.evaluation.compact_routes import compact_route, expert_shares
from milora.evaluation.measurement import EvaluationSettings, Judging, evaluate
from milora.evaluation.mt_bench.model_answers import TURNS, conversation_prompt
from milora.evaluation.predictions import read_predictions
from milora.inference.generation import Decoding, encode_prompt
from milora.inference.routing import route_prompts
from milora.tasks import registry
from milora.tasks.mt_bench import MtBench
from milora_core.errors import MiLoraError
from reproduction.grid import MT_BENCH, ROUTED, Run
from reproduction.inputs import Inputs

Scores = dict[str, dict[str, Any]]


class UnfinishedRunError(MiLoraError):
    """A run cannot finish now for an external reason. The next call continues it."""


@dataclass(frozen=True)
class AdapterTests:
    """The tests of a run's adapter, which `model` has. Predictions, answers and judgements in `folder` are reused."""

    run: Run
    model: Any
    tokenizer: Any
    folder: Path
    inputs: Inputs

    def test(self) -> tuple[Scores, Scores]:
        """Returns the scores by task, and for methods with routers the experts' shares by task."""
        scores: Scores = {}
        shares: Scores = {}
        for name in self.run.tests:
            if name == MT_BENCH:
                routed = self._first_turn_routes() if self.run.method in ROUTED else []
                if self.inputs.request.judge_url is not None:
                    scores[name] = self._graded_conversations()
            else:
                path = self.folder / f"{name}.test.jsonl"
                scores[name] = self._accuracy(name, path)
                routed = [row for row in read_predictions(path) if row.get("route")]
            if routed:
                shares[name] = share_record(routed)
        return scores, shares

    def _accuracy(self, name: str, path: Path) -> dict[str, Any]:
        task = registry.get(name, self.inputs.request.data_dir)
        settings = self.run.evaluation
        found = evaluate_task(
            self.model,
            self.tokenizer,
            task,
            split="test",
            limit=settings["test_rows"],
            decoding=Decoding(max_new_tokens=task.max_new_tokens, beams=settings["beams"]),
            batch_size=settings["batch_size"],
            output=path,
        )
        theirs = {} if found.llm_adapters is None else {"llm_adapters_accuracy": found.llm_adapters.accuracy}
        return {key: getattr(found, key) for key in ("accuracy", "rows", "correct", "unparsed", "no_room")} | theirs

    def _first_turn_routes(self) -> list[dict[str, Any]]:
        """The routes of the first turns, without answers, for questions that fit the model's positions."""
        positions = positions_of(self.model)
        turns = [question.turns[:1] for question in MtBench(self.inputs.request.data_dir).questions()]
        prompts = [conversation_prompt(self.tokenizer, turn, ()) for turn in turns]
        fitting = [one for one in prompts if positions is None or len(encode_prompt(self.tokenizer, one)) <= positions]
        if not fitting:
            return []
        routes = route_prompts(self.model, self.tokenizer, fitting, self.run.evaluation["batch_size"])
        return [{"route": compact_route(routes, row)} for row in range(len(fitting))]

    def _graded_conversations(self) -> dict[str, Any]:
        """Runs MT-Bench's conversations and grades them with the judge, as `milora evaluate --task mt-bench` does."""
        request = self.inputs.request
        settings = EvaluationSettings(
            seed=self.run.seed,
            batch_size=self.run.evaluation["batch_size"],
            output_dir=self.folder,
            judging=Judging(url=request.judge_url, model=request.judge_model),
        )
        try:
            found = evaluate(self.model, self.tokenizer, MtBench(request.data_dir), settings)
        except MiLoraError as error:
            raise UnfinishedRunError(str(error)) from error
        if found["failed"]:
            raise UnfinishedRunError(f"{found['failed']} judgements could not be had: {found['reason']}")
        # The mean grade, of 10; turns; turns without room for an answer; judgements without a grade.
        figures = {"score": found["score"], "rows": TURNS * found["questions"], "no_room": found["no_room"]}
        figures |= {"unparsed": 0, "ungraded": found["unparsed"]}
        return figures | {name: found[name] for name in ("judge", "prompts", "turns", "categories")}


def share_record(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The share of prompts that chose each expert in each block, over predictions with routes.

    Returns:
        `experts`, `blocks` (their numbers), `share` (blocks x experts), and `prompts` (the number of prompts).
    """
    shares = expert_shares(rows)
    blocks = sorted(next(iter(shares.values())))
    share = [[round(of_expert[block], 4) for of_expert in shares.values()] for block in blocks]
    return {"experts": list(shares), "blocks": blocks, "share": share, "prompts": len(rows)}
