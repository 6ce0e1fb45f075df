"""The load generator, against a server with known answers."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.judge import Server

from milora.benchmark.serve import Endpoint, ServeSettings, planned, serve_load
from milora.benchmark.serve_client import Answer
from milora.benchmark.serve_summary import fairness, percentile, summary
from milora_cli.main import main
from milora_core.errors import MiLoraError


def answer(model: str, due: float, *arrivals: float, tokens: int | None = None, error: str = "") -> Answer:
    return Answer(model, due, len(arrivals) if tokens is None else tokens, 4, list(arrivals), arrivals[-1], "", error)


def test_percentiles_are_numpy_s() -> None:
    values = [3.0, 1.0, 7.5, 2.0]
    for percent in (0, 10, 50, 95, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_a_summary_by_hand() -> None:
    answers = [
        answer("ada", 0.0, 1.0, 1.5, 2.0),
        answer("bo", 1.0, 4.0, 5.0),
        answer("bo", 2.0, 10.0, error="500 broken"),
    ]
    found = summary(answers)
    assert (found["requests"], found["failed"], found["errors"]) == (3, 1, {"500 broken": 1})
    assert (found["seconds"], found["tokens"], found["tokens_per_second"]) == (10.0, 5, 0.5)
    assert found["first_token"]["mean"] == 2.0
    assert found["between_tokens"]["max"] == 1.0
    assert found["per_token"]["mean"] == 0.75
    assert found["request"]["p50"] == 3.0
    assert found["tenants"]["ada"]["first_token"]["p50"] == 1.0
    # The speeds are 3/2 and 2/4.
    assert found["fairness"] == {
        "jain": round(2.0**2 / (2 * (1.5**2 + 0.5**2)), 4),
        "slowest_to_fastest_first_token": 3,
    }


def test_fairness_is_one_for_equals_and_one_nth_for_a_monopoly() -> None:
    assert fairness([answer(name, 0.0, 1.0, 2.0) for name in "abcd"])["jain"] == 1.0
    starved = [answer(name, 0.0, 1.0, 2.0, tokens=0) for name in "bcd"]
    assert fairness([answer("a", 0.0, 1.0, 2.0), *starved])["jain"] == 0.25
    assert fairness([])["jain"] is None


def test_arrivals_are_poisson_and_come_from_the_seed() -> None:
    settings = ServeSettings((), requests=4000, rate=20.0, prompt_words=(3, 5), shared_words=7)
    requests = planned(settings, 0)
    assert requests == planned(settings, 0) != planned(settings, 1)
    gaps = [later.due - earlier.due for earlier, later in pairwise(requests)]
    # For an exponential distribution, mean and deviation are both 1 / rate.
    assert statistics.fmean(gaps) == pytest.approx(0.05, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.05, rel=0.1)
    shared = {" ".join(request.prompt.split()[:7]) for request in requests}
    assert len(shared) == 1
    assert {len(request.prompt.split()) for request in requests} == {10, 11, 12}
    models = Counter(request.model % 4 for request in requests)
    assert all(count == pytest.approx(1000, rel=0.15) for count in models.values())
    assert {request.due for request in planned(ServeSettings((), requests=5), 0)} == {0.0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://h:1", ("http://h:1/v1", "http://h:1/v1", ())),
        ("http://h:1/v1/#a,b", ("http://h:1/v1", "http://h:1/v1", ("a", "b"))),
        ("own=https://h/x#a=b", ("own", "https://h/x/v1", ("a=b",))),
    ],
)
def test_endpoints(text: str, expected: Any) -> None:
    found = Endpoint.parse(text)
    assert (found.name, found.url, found.models) == expected
    with pytest.raises(MiLoraError, match="--endpoint"):
        Endpoint.parse("own=h:1")


def events(*pieces: str) -> tuple[int, dict[str, str], str]:
    chunks: list[Any] = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    chunks.append({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 7}})
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return 200, {"Content-Type": "text/event-stream"}, "".join(lines) + "data: [DONE]\n\n"


@pytest.fixture
def server() -> Any:
    server = Server()
    yield server
    server.close()


def test_a_load_on_two_endpoints(server: Server) -> None:
    server.reply = lambda body, number: (503, {}, '{"error": {"message": "busy"}}') if number == 3 else events("a", "b")
    endpoints = (Endpoint.parse(f"one={server.url}#ada,bo"), Endpoint.parse(f"two={server.url}#ada"))
    settings = ServeSettings(
        endpoints, {"ada": "ada-key"}, requests=6, chat=True, rounds=2, ignore_eos=True, body={"seed": 5}, concurrency=2
    )
    told: list[str] = []
    result = serve_load(settings, told.append)
    order = [(row["round"], row["endpoint"]) for row in result["rows"]]
    assert order == [(0, "one"), (0, "two"), (1, "two"), (1, "one")]
    assert len(told) == 4
    assert sum(row["failed"] for row in result["rows"]) == 1
    assert result["rows"][0]["errors"] == {"503 busy": 1}
    assert [row["tokens"] for row in result["rows"]] == [35, 42, 42, 42]
    assert result["medians"]["one"]["ratio_to_first"] == 1.0
    assert len(result["answers"]) == 24
    assert "ada-key" not in json.dumps(result)
    body = server.requests[0]
    assert (body["max_tokens"], body["ignore_eos"], body["seed"], body["stream"]) == (32, True, 5, True)
    keys = {
        (body["model"], headers.get("Authorization"))
        for body, headers in zip(server.requests, server.headers, strict=True)
    }
    assert keys == {("ada", "Bearer ada-key"), ("bo", None)}
    # Both endpoints get the same prompts in a round.
    prompts = [body["messages"][0]["content"] for body in server.requests]
    assert Counter(prompts[:6]) == Counter(prompts[6:12])


def test_the_command(server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    server.reply = lambda body, number: events("a", "b", "c")
    load = [
        "bench",
        "serve",
        "--endpoint",
        f"own={server.url}#ada,bo",
        "--requests",
        "8",
        "--rate",
        "500",
        "--chat",
        "--seed",
        "1",
    ]
    picture, kept = tmp_path / "load.svg", tmp_path / "load.json"
    assert main([*load, "--json", "--output", str(picture), "--output", str(kept)]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed["rows"][0]["tokens"] == 56
    assert set(printed["rows"][0]["tenants"]) == {"ada", "bo"}
    assert "time to first token" in picture.read_text()
    assert len(json.loads(kept.read_text())["answers"]) == 8
    load[load.index("500")] = "inf"
    assert main([*load, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["settings"]["rate"] == 0  # All at once.
    server.reply = lambda body, number: (500, {}, "broken")
    assert main(load) == 1
    assert "8 requests failed: 500 broken" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--endpoint", "nowhere"], "--endpoint nowhere"),
        (["--endpoint", "http://127.0.0.1:9"], "does not answer"),
        (["--endpoint", "http://127.0.0.1:9", "--prompt-words", "9-2"], "--prompt-words"),
        (["--endpoint", "http://127.0.0.1:9", "--body", "[]"], "--body"),
        (["--endpoint", "http://127.0.0.1:9", "--output", "x.txt"], "--output x.txt"),
        (["--endpoint", "http://127.0.0.1:9", "--rate", "nan"], "'--rate'"),
        (["--endpoint", "http://127.0.0.1:9", "--rate", "-inf"], "'--rate'"),
        (["--endpoint", "http://127.0.0.1:9", "--timeout", "inf"], "'--timeout': found inf"),
        (["--endpoint", "http://127.0.0.1:9", "--temperature", "inf"], "'--temperature': found inf"),
        (["--endpoint", "http://127.0.0.1:9", "--endpoint", "http://127.0.0.1:9"], "one name"),
    ],
)
def test_mistakes(options: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *options]) == 2
    error = capfd.readouterr().err
    assert said in error
    assert error.count("\n") == 1
