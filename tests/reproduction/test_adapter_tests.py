"""Tests of a run's adapter without right or wrong answers: MT-Bench with and without a judge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapted import adapted
from support.grids import grid
from support.judge import Server
from support.tokenizer import character_tokenizer

from milora.tasks.mt_bench import MtBench
from reproduction.adapter_tests import AdapterTests, UnfinishedRunError
from reproduction.grid import Run
from reproduction.inputs import Inputs

TURNS = {81: ["Write.", "Shorter."], 82: ["Sing of the sea, and of the ships.", "Louder."]}


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


def run_of(**settings: Any) -> tuple[Run, Inputs]:
    of = grid(sections=["figure2"], tasks=("mt-bench",), seeds=(0,), **settings)
    return of.runs()[0], Inputs(of.request)


def roomy_model() -> Any:
    """The same model at every call. It has more positions, because the template alone exceeds the tiny backbones'."""
    model = adapted("llama").model
    model.config.max_position_embeddings = 1024
    return model


def all_tests(data: Path, **settings: Any) -> AdapterTests:
    run, inputs = run_of(data_dir=str(data), **settings)
    return AdapterTests(run, roomy_model(), character_tokenizer(), data / "predictions", inputs)


def instruction(text: str) -> str:
    """LLM-Adapters' template, written out."""
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{text}\n\n### Response:\n"
    )


def test_first_turns_are_routed_without_an_answer(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = all_tests(data)
    model = roomy_model()
    monkeypatch.setattr(type(model), "generate", lambda *_, **__: pytest.fail("generated"))
    scores, shares = tests.test()
    assert scores == {}
    found = shares["mt-bench"]
    assert found["prompts"] == 2
    tokenizer = character_tokenizer()
    chosen = torch.zeros(len(found["blocks"]), len(found["experts"]))
    for turns in TURNS.values():
        # One prompt at a time, so there is no padding.
        route = model.route(**tokenizer(instruction(turns[0]), return_tensors="pt"))
        assert list(route.experts) == found["experts"]
        chosen += route.chosen[:, 0].float() / len(TURNS)
    assert torch.tensor(found["share"]).equal(chosen)


def test_a_judge_grades_both_turns(judge: Server, data: Path) -> None:
    judge.reply = lambda body, number: f"[[{number}]]"
    scores, shares = all_tests(data, judge_url=judge.url, judge_model="j").test()
    found = scores["mt-bench"]
    assert (found["score"], found["rows"], found["no_room"], found["ungraded"]) == (2.5, 4, 0, 0)
    assert (found["judge"], found["prompts"]) == ("j", "own")
    assert shares["mt-bench"]["prompts"] == 2
    assert {body["model"] for body in judge.requests} == {"j"}
    assert str(data) not in json.dumps(scores), "where a run was made is no result"


def test_without_the_judge_nothing_that_was_made_is_lost(
    judge: Server, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge.reply = lambda body, number: (401, {}, "")
    with pytest.raises(UnfinishedRunError, match=r"refuses \(401\)"):
        all_tests(data, judge_url=judge.url).test()
    judge.reply = lambda body, number: "[[4]]" if number % 2 else (401, {}, "")
    judge.requests.clear()
    with pytest.raises(UnfinishedRunError, match=r"2 judgements could not be had: .*401"):
        all_tests(data, judge_url=judge.url).test()
    judge.reply = lambda body, number: "[[8]]"
    judge.requests.clear()
    monkeypatch.setattr(type(roomy_model()), "generate", lambda *_, **__: pytest.fail("generated again"))
    scores, _ = all_tests(data, judge_url=judge.url).test()
    assert scores["mt-bench"]["score"] == 6
    assert len(judge.requests) == 2, "grades that were had are not asked for again"
