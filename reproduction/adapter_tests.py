"""The tests of a run's adapter: accuracy by task, MT-Bench, and the routers' choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from milora.backbone.positions import positions_of
from milora.evaluation.accuracy import Evaluation, evaluate_task
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


class AdapterTests:
    """The tests of a run.

    Args:
        run: The run.
        model: The backbone with the run's adapter.
        tokenizer: The model's tokenizer.
        folder: Folder of predictions, answers and judgements. Existing ones are reused.
        inputs: The sources of rows, and the judge.
    """

    def __init__(self, run: Run, model: Any, tokenizer: Any, folder: Path, inputs: Inputs) -> None:
        self._run = run
        self._model = model
        self._tokenizer = tokenizer
        self._folder = folder
        self._data_dir = inputs.request.data_dir
        self._judging = Judging(url=inputs.request.judge_url, model=inputs.request.judge_model)

    def test(self) -> tuple[Scores, Scores]:
        """Returns the scores by task, and for methods with routers the experts' shares by task.

        Raises:
            UnfinishedRunError: If the judge cannot be reached.
            MiLoraError: If a task cannot be tested.
        """
        scores: Scores = {}
        shares: Scores = {}
        for name in self._run.tests:
            if name == MT_BENCH:
                routed = self._first_turn_routes() if self._run.method in ROUTED else []
                if self._judging.url is not None:
                    scores[name] = self._graded_conversations()
            else:
                path = self._folder / f"{name}.test.jsonl"
                scores[name] = self._accuracy(name, path)
                routed = [row for row in read_predictions(path) if row.get("route")]
            if routed:
                shares[name] = share_record(routed)
        return scores, shares

    def _accuracy(self, name: str, path: Path) -> dict[str, Any]:
        task = registry.get(name, self._data_dir)
        found: Evaluation = evaluate_task(
            self._model,
            self._tokenizer,
            task,
            split="test",
            limit=self._run.evaluation["test_rows"],
            decoding=Decoding(max_new_tokens=task.max_new_tokens, beams=self._run.evaluation["beams"]),
            batch_size=self._run.evaluation["batch_size"],
            output=path,
        )
        theirs = {} if found.llm_adapters is None else {"llm_adapters_accuracy": found.llm_adapters.accuracy}
        figures = {key: getattr(found, key) for key in ("accuracy", "rows", "correct", "unparsed", "no_room")}
        return figures | theirs

    def _first_turn_routes(self) -> list[dict[str, Any]]:
        """The routes of the first turns, without answers, for questions that fit the model's positions."""
        positions = positions_of(self._model)
        turns = [question.turns[:1] for question in MtBench(self._data_dir).questions()]
        prompts = [conversation_prompt(self._tokenizer, turn, ()) for turn in turns]
        fitting = [one for one in prompts if positions is None or len(encode_prompt(self._tokenizer, one)) <= positions]
        if not fitting:
            return []
        routes = route_prompts(self._model, self._tokenizer, fitting, self._run.evaluation["batch_size"])
        return [{"route": compact_route(routes, row)} for row in range(len(fitting))]

    def _graded_conversations(self) -> dict[str, Any]:
        """Runs MT-Bench's conversations and grades them with the judge, as `milora evaluate --task mt-bench` does.

        Returns:
            `score` (the mean grade, of 10), `rows` (turns), `no_room` (turns without room for an answer), `ungraded`
            (judgements without a grade), `judge`, `prompts`, `turns` and `categories` (means).
        """
        settings = EvaluationSettings(
            seed=self._run.seed,
            batch_size=self._run.evaluation["batch_size"],
            output_dir=self._folder,
            judging=self._judging,
        )
        try:
            found = evaluate(self._model, self._tokenizer, MtBench(self._data_dir), settings)
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


def share_record(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The share of prompts that chose each expert in each block.

    Args:
        rows: Predictions, all with a route.

    Returns:
        `experts`, `blocks` (their numbers), `share` (blocks x experts), and `prompts` (the number of prompts).
    """
    shares = expert_shares(rows)
    blocks = sorted(next(iter(shares.values())))
    share = [[round(of_expert[block], 4) for of_expert in shares.values()] for block in blocks]
    return {"experts": list(shares), "blocks": blocks, "share": share, "prompts": len(rows)}
