"""What a run's adapter is tested on beside answers that are right or wrong: MT-Bench with and without a judge, dev."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapted import adapted
from support.grids import grid
from support.judge import Server
from support.tokenizer import character_tokenizer

from milora.evaluation.run import Judging
from milora.paper.adapter_tests import AdapterTests
from milora.paper.materials import Materials
from milora.paper.runs import Run, UnfinishedRunError
from milora.paper.store import Results
from milora.tasks.mt_bench import MtBench

TURNS = {81: ["Write.", "Shorter."], 82: ["Sing of the sea, and of the ships.", "Louder."]}
NOT_AT_HAND = {"mmlu": "no folder mmlu", "bbh": "no folder bbh"}


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(MtBench, "max_new_tokens", 3)
    server = Server()
    yield server
    server.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "mt_bench").mkdir()
    questions = [{"question_id": number, "category": "math", "turns": turns} for number, turns in TURNS.items()]
    (tmp_path / "mt_bench" / "question.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    (tmp_path / "alpaca").mkdir()
    rows = [{"instruction": f"Say {number}.", "input": "", "output": f"{number}!"} for number in range(40)]
    (tmp_path / "alpaca" / "train.json").write_text(json.dumps(rows))
    return tmp_path


def run_of(method: str, **flags: Any) -> Run:
    of = grid(NOT_AT_HAND, sections=["table3", "figure2"], tasks=(), seeds=(0,), **flags)
    return next(
        run for run in of.runs(Results(), lambda digest: False) if (run.method, run.tasks) == (method, ("alpaca",))
    )


def roomy_model() -> Any:
    """The same model at every call; the template alone is longer than the tiny backbones' positions."""
    model = adapted("llama").model
    model.config.max_position_embeddings = 1024
    return model


def all_tests(run: Run, data: Path, judging: Judging | None = None) -> AdapterTests:
    model = roomy_model()
    return AdapterTests(run, model, character_tokenizer(), data / "predictions", Materials(str(data), judging))


def instruction(text: str) -> str:
    """LLM-Adapters' template, written out."""
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{text}\n\n### Response:\n"
    )


def test_first_turns_are_routed_without_an_answer(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = all_tests(run_of("milora"), data)
    model = roomy_model()
    monkeypatch.setattr(type(model), "generate", lambda *_, **__: pytest.fail("generated"))
    scores, shares = tests.test()
    assert scores == {}
    found = shares["mt-bench"]
    assert found["prompts"] == 2
    tokenizer = character_tokenizer()
    chosen = torch.zeros(len(found["blocks"]), len(found["experts"]))
    for turns in TURNS.values():
        # One prompt at a time, so that nothing is padded.
        route = model.route(**tokenizer(instruction(turns[0]), return_tensors="pt"))
        assert list(route.experts) == found["experts"]
        chosen += route.chosen[:, 0].float() / len(TURNS)
    assert torch.tensor(found["share"]).equal(chosen)


def test_a_judge_grades_both_turns(judge: Server, data: Path) -> None:
    judge.reply = lambda body, number: f"[[{number}]]"
    run = run_of("milora", judge_url=judge.url, judge_model="j")
    scores, shares = all_tests(run, data, Judging(url=judge.url, model="j")).test()
    found = scores["mt-bench"]
    assert (found["score"], found["rows"], found["no_room"], found["ungraded"]) == (2.5, 4, 0, 0)
    assert (found["judge"], found["prompts"]) == ("j", "own")
    assert shares["mt-bench"]["prompts"] == 2
    assert {body["model"] for body in judge.requests} == {"j"}
    assert str(data) not in json.dumps(scores), "where a run was made is no result"


def test_without_the_judge_nothing_that_was_made_is_lost(
    judge: Server, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of("milora", judge_url=judge.url)
    judge.reply = lambda body, number: (401, {}, "")
    with pytest.raises(UnfinishedRunError, match=r"refuses \(401\)"):
        all_tests(run, data, Judging(url=judge.url)).test()
    judge.reply = lambda body, number: "[[4]]" if number % 2 else (401, {}, "")
    judge.requests.clear()
    with pytest.raises(UnfinishedRunError, match=r"2 judgements could not be had: .*401"):
        all_tests(run, data, Judging(url=judge.url)).test()
    judge.reply = lambda body, number: "[[8]]"
    judge.requests.clear()
    monkeypatch.setattr(type(roomy_model()), "generate", lambda *_, **__: pytest.fail("generated again"))
    scores, _ = all_tests(run, data, Judging(url=judge.url)).test()
    assert scores["mt-bench"]["score"] == 6
    assert len(judge.requests) == 2, "grades that were had are not asked for again"


def test_the_dev_rows_of_instructions_have_a_perplexity(data: Path) -> None:
    run = run_of("milora", evaluation={"dev_rows": 2})
    found = all_tests(run, data).dev()
    assert set(found) == {"alpaca"}
    assert found["alpaca"]["rows"] == 2
    # A random model of 97 tokens does not know much.
    assert 10 < found["alpaca"]["perplexity"] < 1000
    assert math.isfinite(found["alpaca"]["perplexity"])
    both = replace(run, tasks=("bundled-choice",), evaluation={**run.evaluation, "dev_rows": 1, "beams": 1})
    assert set(all_tests(both, data).dev()["bundled-choice"]) >= {"accuracy", "rows"}
    assert all_tests(replace(run, evaluation={**run.evaluation, "dev_rows": 0}), data).dev() == {}
