"""What a run's adapter is tested on: accuracy by task, MT-Bench, dev; and what its routers chose meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from milora.evaluation.generation import Evaluation, evaluate_task
from milora.evaluation.perplexity import completion_perplexity
from milora.evaluation.predictions import read_predictions
from milora.evaluation.routes import expert_shares
from milora.inference.generation import Decoding
from milora.paper.conversations import first_turn_routes, graded_conversations
from milora.paper.grid import ROUTED
from milora.paper.materials import MT_BENCH, Materials, has_answers
from milora.paper.runs import Run
from milora.tasks import registry
from milora.tasks.mt_bench import MtBench
from milora.tasks.task import Split

Scores = dict[str, dict[str, Any]]


class AdapterTests:
    """The tests of a run.

    Args:
        run: Which.
        model: The backbone with the run's adapter.
        tokenizer: The model's.
        folder: For predictions, answers and judgements; those that it has are not made again.
        materials: Where rows come from, and the judge.
    """

    def __init__(self, run: Run, model: Any, tokenizer: Any, folder: Path, materials: Materials) -> None:
        self._run = run
        self._model = model
        self._tokenizer = tokenizer
        self._folder = folder
        self._materials = materials

    def test(self) -> tuple[Scores, Scores]:
        """Scores by task, and where there were routes, the experts' shares by task.

        MT-Bench has no score without a judge, and routes of methods that have routers.

        Raises:
            UnfinishedRunError: If the judge could not be had.
            MiLoraError: If a task cannot be tested.
        """
        scores: Scores = {}
        shares: Scores = {}
        for name in self._run.tests:
            if name == MT_BENCH:
                routed = self._routes_of_questions()
                if "judge" in self._run.evaluation:
                    scores[name] = graded_conversations(
                        self._run, self._model, self._tokenizer, self._folder, self._materials
                    )
            else:
                path = self._folder / f"{name}.test.jsonl"
                scores[name] = _score(self._evaluate(name, "test", self._run.evaluation["test_rows"], path))
                routed = [row for row in read_predictions(path) if row.get("route")]
            if routed:
                shares[name] = share_record(routed)
        return scores, shares

    def dev(self) -> Scores:
        """What the run's tasks come to on their dev rows; perplexity if one of them has no answers that are right."""
        limit = self._run.evaluation["dev_rows"]
        if not limit:
            return {}
        if all(map(has_answers, self._run.tasks)):
            return {
                name: _score(self._evaluate(name, "dev", limit, self._folder / f"{name}.dev.jsonl"))
                for name in self._run.tasks
            }
        return {name: self._perplexity(name, limit) for name in self._run.tasks}

    def _evaluate(self, name: str, split: Split, limit: int | None, path: Path) -> Evaluation:
        task = registry.get(name, self._materials.data_dir)
        return evaluate_task(
            self._model,
            self._tokenizer,
            task,
            split=split,
            limit=limit,
            decoding=Decoding(max_new_tokens=task.max_new_tokens, beams=self._run.evaluation["beams"]),
            batch_size=self._run.evaluation["batch_size"],
            output=path,
        )

    def _perplexity(self, name: str, limit: int) -> dict[str, Any]:
        examples = registry.get(name, self._materials.data_dir).examples("dev", limit, 0)
        batch = self._run.evaluation["batch_size"]
        found = completion_perplexity(self._model, self._tokenizer, examples, batch_size=batch)
        return {"perplexity": found.perplexity, "rows": found.rows, "no_room": found.no_room}

    def _routes_of_questions(self) -> list[dict[str, Any]]:
        if self._run.method not in ROUTED:
            return []
        questions = MtBench(self._materials.data_dir).questions()
        return first_turn_routes(self._model, self._tokenizer, questions, self._run.evaluation["batch_size"])


def share_record(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The share of prompts that chose each expert in each block, as a record holds it.

    Args:
        rows: Of predictions, all with a route.

    Returns:
        `experts`, `blocks` (their numbers), `share` (blocks x experts), and `prompts`, how many there were.
    """
    shares = expert_shares(rows)
    blocks = sorted(next(iter(shares.values())))
    share = [[round(of_expert[block], 4) for of_expert in shares.values()] for block in blocks]
    return {"experts": list(shares), "blocks": blocks, "share": share, "prompts": len(rows)}


def _score(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "accuracy": evaluation.accuracy,
        "rows": evaluation.rows,
        "correct": evaluation.correct,
        "unparsed": evaluation.unparsed,
        "no_room": evaluation.no_room,
    }
