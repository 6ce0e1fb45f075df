"""Judging over real HTTP, with a server that speaks the protocol and misbehaves on request."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.judge import Server

from milora.evaluation.mt_bench import grades, judge_prompts, judging
from milora.evaluation.mt_bench.client import ChatEndpoint
from milora.evaluation.mt_bench.model_answers import Answer
from milora.tasks.mt_bench import Question
from milora_core.errors import DataError, MiLoraError

QUESTIONS = [
    Question(81, "writing", ("Write {a} poem.", "Shorten it."), ()),
    Question(101, "reasoning", ("Who is second?", "And now?"), ("You are.", "Still you.")),
]
OURS = [Answer(81, "ours", ("Roses.", "Rose.")), Answer(101, "ours", ("Me.", "Me too."))]
THEIRS = [Answer(81, "theirs", ("Violets.", "Violet.")), Answer(101, "theirs", ("Him.", "Him too."))]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("MILORA_JUDGE_API_KEY", "OPENAI_API_KEY", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    running = Server()
    yield running
    running.close()


def endpoint(server: Server, **settings: Any) -> ChatEndpoint:
    return ChatEndpoint(server.url, "judge-1", **{"timeout": 5.0, "retries": 2, **settings})


def judge_run(server: Server, path: Path, **values: Any) -> judging.JudgeRun:
    return judging.JudgeRun(**{"judge": endpoint(server), "prompts": judge_prompts.OWN, "path": path, **values})


def grade(server: Server, path: Path, **values: Any) -> judging.Outcome:
    return judging.grade(judge_run(server, path, **values), QUESTIONS, OURS)


class TestClient:
    def test_what_is_sent(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", "other")
        monkeypatch.setenv("MILORA_JUDGE_API_KEY", "secret")
        messages = [{"role": "user", "content": "Hi"}]
        assert endpoint(server).complete(messages, temperature=0, max_tokens=9) == "Fine. Rating: [[7]]"
        assert server.requests == [{"model": "judge-1", "messages": messages, "temperature": 0, "max_tokens": 9}]
        assert server.headers[0]["Authorization"] == "Bearer secret"

    def test_no_key_no_header(self, server: Server) -> None:
        endpoint(server).complete([], temperature=0, max_tokens=1)
        assert "Authorization" not in server.headers[0]

    @pytest.mark.parametrize("status", [429, 500, 503])
    def test_repeated(self, server: Server, status: int) -> None:
        server.reply = lambda body, number: (status, {}, "busy") if number < 3 else "done"
        assert endpoint(server).complete([], temperature=0, max_tokens=1) == "done"
        assert len(server.requests) == 3

    def test_waits_as_long_as_the_server_asks(self, server: Server) -> None:
        server.reply = lambda body, number: (429, {"Retry-After": "1"}, "") if number == 1 else "done"
        before = time.monotonic()
        assert endpoint(server).complete([], temperature=0, max_tokens=1) == "done"
        assert time.monotonic() - before >= 1

    def test_does_not_wait_for_hours(self, server: Server) -> None:
        server.reply = lambda body, number: (429, {"Retry-After": "3600"}, "")
        with pytest.raises(MiLoraError, match=r"answered 429: .*It asks to wait 3600 seconds"):
            endpoint(server).complete([], temperature=0, max_tokens=1)
        assert len(server.requests) == 1

    @pytest.mark.parametrize(
        ("reply", "message", "requests"),
        [
            ((503, {}, "over  capacity"), "answered 503: over capacity", 3),
            ((400, {}, "no such\nmodel"), "answered 400: no such model", 1),
            ((401, {}, ""), r"refuses \(401\).*set MILORA_JUDGE_API_KEY", 1),
            ((200, {"Content-Type": "text/html"}, "<html>"), "no chat completion: <html>", 1),
            ((200, {}, "<html>"), "no chat completion: Expecting value", 1),
            ((200, {}, '{"choices": []}'), "no chat completion", 1),
            ((200, {}, '{"choices": [{"message": {"content": null}}]}'), "without text", 1),
        ],
    )
    def test_refusals(self, server: Server, reply: Any, message: str, requests: int) -> None:
        server.reply = lambda body, number: reply
        with pytest.raises(MiLoraError, match=message):
            endpoint(server).complete([], temperature=0, max_tokens=1)
        assert len(server.requests) == requests

    def test_a_server_that_is_silent(self, server: Server) -> None:
        server.reply = lambda body, number: None
        with pytest.raises(MiLoraError, match=r"does not answer"):
            endpoint(server, timeout=0.2, retries=1).complete([], temperature=0, max_tokens=1)
        # The client can give up before the server's thread has read the request.
        end = time.monotonic() + 10
        while len(server.requests) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        assert len(server.requests) == 2

    def test_no_server(self) -> None:
        with pytest.raises(MiLoraError, match=r"127.0.0.1:1/v1/chat/completions does not answer"):
            ChatEndpoint("http://127.0.0.1:1/v1", "m", retries=0).complete([], temperature=0, max_tokens=1)

    def test_without_the_sdk_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "openai", None)
        with pytest.raises(MiLoraError, match=r'pip install "milora\[judge\]"'):
            ChatEndpoint("http://127.0.0.1:1/v1", "m")

    def test_no_address(self) -> None:
        with pytest.raises(MiLoraError, match=r"http:// or https://"):
            ChatEndpoint("api.openai.com", "m")


class TestInterruption:
    # A shell's background jobs ignore SIGINT, and child processes inherit that.
    SCRIPT = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from milora.evaluation.mt_bench import judge_prompts, judging
from milora.evaluation.mt_bench.model_answers import Answer
from milora.evaluation.mt_bench.client import ChatEndpoint
from milora.tasks.mt_bench import Question
try:
    judging.grade(
        judging.JudgeRun(ChatEndpoint(sys.argv[1], "j"), judge_prompts.OWN, Path(sys.argv[2]), workers=2),
        [Question(1, "writing", ("a", "b"), ())], [Answer(1, "m", ("c", "d"))],
    )
except KeyboardInterrupt:
    sys.exit(130)
"""

    @pytest.mark.slow
    def test_does_not_wait_for_requests_under_way(self, server: Server, tmp_path: Path) -> None:
        release = threading.Event()

        def reply(body: dict[str, Any], number: int) -> str:
            if number > 1:
                release.wait(300)
            return "[[5]]"

        server.reply = reply
        path = tmp_path / "single.jsonl"
        environment = {**os.environ, "NO_PROXY": "127.0.0.1"}
        process = subprocess.Popen([sys.executable, "-c", self.SCRIPT, server.url, str(path)], env=environment)
        try:
            while len(server.requests) < 2 or not path.exists() or not path.read_text().endswith("\n"):
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            # A request can take 120 seconds and is repeated six times.
            assert process.wait(60) == 130
        finally:
            release.set()
            process.kill()
            process.wait()
        assert len(path.read_text().splitlines()) == 1, "what came before is kept"


class TestGrading:
    def test_every_turn_is_graded_once(self, server: Server, tmp_path: Path) -> None:
        path = tmp_path / "single.jsonl"
        outcome = grade(server, path)
        assert outcome.failed == 0
        assert [(r["question_id"], r["turn"], r["score"]) for r in outcome.records] == [
            (81, 1, 7.0),
            (81, 2, 7.0),
            (101, 1, 7.0),
            (101, 2, 7.0),
        ]
        assert {tuple(r["judge"]) for r in outcome.records} == {
            ("judge-1", name)
            for name in ("single-v1", "single-v1-multi-turn", "single-math-v1", "single-math-v1-multi-turn")
        }
        assert len(server.requests) == 4
        assert grade(server, path).records == outcome.records
        assert len(server.requests) == 4

    def test_what_the_judge_reads(self, server: Server, tmp_path: Path) -> None:
        records = grade(server, tmp_path / "single.jsonl").records
        texts = {(r["question_id"], r["turn"]): r["user_prompt"] for r in records}
        assert "Write {a} poem." in texts[81, 1]
        assert "Roses." in texts[81, 1]
        assert "Rose." not in texts[81, 1].replace("Roses.", "")
        for part in (*QUESTIONS[1].turns, *QUESTIONS[1].references, *OURS[1].turns):
            assert part in texts[101, 2]
        assert "Still you." not in texts[101, 1]

    def test_a_judge_that_talks_nonsense(self, server: Server, tmp_path: Path) -> None:
        server.reply = lambda body, number: "I like it." if number == 1 else "[[4]]"
        outcome = grade(server, tmp_path / "s.jsonl", workers=1)
        summary = grades.grades(outcome.records, QUESTIONS)
        assert summary["unparsed"] == 1
        assert summary["judgements"] == 4
        assert summary["score"] == 4

    def test_failures_are_counted_and_tried_again(self, server: Server, tmp_path: Path) -> None:
        path = tmp_path / "single.jsonl"
        server.reply = lambda body, number: (
            "[[9]]" if "poem" in body["messages"][1]["content"] else (400, {}, "too long")
        )
        outcome = grade(server, path)
        assert (len(outcome.records), outcome.failed) == (2, 2)
        assert outcome.reason is not None
        assert "too long" in outcome.reason
        server.reply = lambda body, number: "[[5]]"
        assert [r["score"] for r in grade(server, path).records] == [9, 9, 5, 5]
        assert len(path.read_text().splitlines()) == 4

    def test_goes_on_after_half_a_line(self, server: Server, tmp_path: Path) -> None:
        path = tmp_path / "single.jsonl"
        grade(server, path)
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(lines[0] + lines[1][:40])
        assert len(grade(server, path).records) == 4
        assert len(server.requests) == 4 + 3
        assert len(path.read_text().splitlines()) == 4

    def test_other_answers_and_other_prompts_are_graded_anew(self, server: Server, tmp_path: Path) -> None:
        path = tmp_path / "single.jsonl"
        grade(server, path)
        server.reply = lambda body, number: "[[2]]"
        changed = [Answer(81, "ours", ("Roses.", "Tulip.")), OURS[1]]
        outcome = judging.grade(judge_run(server, path), QUESTIONS, changed)
        assert [record["score"] for record in outcome.records] == [7, 2, 7, 7]
        reworded = {**judge_prompts.OWN, "single-v1": judge_prompts.JudgePrompt("single-v1", "", "{question} {answer}")}
        outcome = judging.grade(judge_run(server, path, prompts=reworded), QUESTIONS, changed)
        assert [record["score"] for record in outcome.records] == [2, 2, 7, 7]
        assert len(server.requests) == 4 + 1 + 1

    def test_another_judge_grades_anew(self, server: Server, tmp_path: Path) -> None:
        path = tmp_path / "single.jsonl"
        grade(server, path)
        other = ChatEndpoint(server.url, "judge-2")
        assert len(grade(server, path, judge=other).records) == 4
        assert len(server.requests) == 8


class TestComparing:
    @pytest.mark.parametrize(
        ("reply", "winners", "summary"),
        [
            ("[[C]]", ("tie", "tie"), {"wins": 0, "ties": 4, "losses": 0, "unparsed": 0, "win_rate": 0.5}),
            # Always the first position: no one wins.
            ("[[A]]", ("model_1", "model_2"), {"wins": 0, "ties": 4, "losses": 0, "unparsed": 0, "win_rate": 0.5}),
            ("who?", ("error", "error"), {"wins": 0, "ties": 0, "losses": 0, "unparsed": 4, "win_rate": None}),
            (
                "[[A]] or [[B]]",
                ("error", "error"),
                {"wins": 0, "ties": 0, "losses": 0, "unparsed": 4, "win_rate": None},
            ),
        ],
    )
    def test_verdicts(
        self, server: Server, tmp_path: Path, reply: str, winners: tuple[str, str], summary: dict[str, Any]
    ) -> None:
        server.reply = lambda body, number: reply
        outcome = judging.compare(judge_run(server, tmp_path / "pair.jsonl"), QUESTIONS, OURS, THEIRS)
        assert {(r["g1_winner"], r["g2_winner"]) for r in outcome.records} == {winners}
        assert grades.wins(outcome.records) == summary
        assert len(server.requests) == 8

    def test_the_better_one_wins_from_both_places(self, server: Server, tmp_path: Path) -> None:
        def prefers_ours(body: dict[str, Any], number: int) -> str:
            text = body["messages"][1]["content"]
            ours = min(text.find(word) for word in ("Roses.", "Me.") if word in text)
            theirs = min(text.find(word) for word in ("Violets.", "Him.") if word in text)
            return "[[A]]" if ours < theirs else "[[B]]"

        server.reply = prefers_ours
        run = judge_run(server, tmp_path / "pair.jsonl")
        outcome = judging.compare(run, QUESTIONS, OURS, THEIRS)
        assert grades.wins(outcome.records)["wins"] == 4
        judging.compare(run, QUESTIONS, OURS, THEIRS)
        assert len(server.requests) == 8

    def test_an_answer_without_its_counterpart(self, server: Server, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="101 has an answer of only one"):
            judging.compare(judge_run(server, tmp_path / "pair.jsonl"), QUESTIONS, OURS, THEIRS[:1])


@pytest.mark.parametrize(
    ("judgement", "rating"),
    [
        ("Rating: [[5]]", 5),
        ("[[8.5]] good", 8.5),
        ("Rating: [10]", 10),
        ("[[11]]", -1),
        ("[[0]]", -1),
        ("ten", -1),
        ("[1] is fine, so [[9]]", 9),
    ],
)
def test_ratings(judgement: str, rating: float) -> None:
    assert judging.parse_rating(judgement) == rating


@given(st.text())
def test_no_judgement_breaks_the_parsers(text: str) -> None:
    assert judging.parse_rating(text) == -1 or 1 <= judging.parse_rating(text) <= 10
    assert judging.parse_verdict(text) in {None, "A", "B", "C"}


def test_means_by_hand() -> None:
    rows = [(81, 1, 8), (81, 2, 4), (101, 1, -1), (101, 2, 6)]
    records = [{"question_id": question, "turn": turn, "score": score} for question, turn, score in rows]
    assert grades.grades(records, QUESTIONS) == {
        "score": 6,
        "turns": {"1": 8, "2": 5},
        "categories": {"writing": 6, "reasoning": 6},
        "judgements": 4,
        "unparsed": 1,
    }


class TestPrompts:
    def test_fastchats_file_is_used_where_it_lies(self, tmp_path: Path) -> None:
        row = {
            "name": "single-v1",
            "system_prompt": "S",
            "prompt_template": "Q {question} A {answer}",
            "type": "single",
        }
        (tmp_path / "judge_prompts.jsonl").write_text(json.dumps(row) + "\n")
        loaded = judge_prompts.load(tmp_path)
        assert loaded["single-v1"].fill({"question": "q", "answer": "{a}"})[1]["content"] == "Q q A {a}"
        assert loaded["pair-v2"] == judge_prompts.OWN["pair-v2"]

    def test_a_broken_file(self, tmp_path: Path) -> None:
        (tmp_path / "judge_prompts.jsonl").write_text('{"name": "x"}\n')
        with pytest.raises(DataError, match="line 1: `system_prompt` is missing"):
            judge_prompts.load(tmp_path)

    def test_a_place_that_nothing_fills(self) -> None:
        with pytest.raises(DataError, match=r"'x' has a place 'mood'"):
            judge_prompts.JudgePrompt("x", "", "{mood}").fill({"question": ""})


def test_a_reference_to_the_first_turn_only(server: Server, tmp_path: Path) -> None:
    question = Question(1, "math", ("a?", "b?"), ("first",))
    outcome = judging.grade(judge_run(server, tmp_path / "s"), [question], [Answer(1, "m", ("x", "y"))])
    assert [record["judge"][1] for record in outcome.records] == ["single-math-v1", "single-v1-multi-turn"]
