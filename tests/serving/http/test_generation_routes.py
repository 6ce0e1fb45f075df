"""Completions and chats in OpenAI's format, complete and streamed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from support.fake_engine import FakeEngine, spelled
from support.tokenizer import CHARACTERS, character_tokenizer

from milora.serving.app import build_app
from milora.serving.events import TokenEvent
from milora.serving.logs import JsonFormatter
from milora.serving.requests import AdapterError, DeadlineError, EngineStoppedError, NumericalError, QueueFullError
from milora_core.routing import Route


def ids(text: str) -> tuple[int, ...]:
    return tuple(CHARACTERS.index(character) + 1 for character in text)


def streamed(text: str) -> list[Any]:
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def complete(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"model": "ada", "prompt": "hey", **body})
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


ROUTE = Route(
    torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.75, 0.25]]]), ("self_attn.q_proj", "mlp.up_proj"), ("layers.0",)
)


def test_a_completion(client: TestClient, engine: FakeEngine) -> None:
    engine.script = lambda request: spelled("yes", cached_tokens=2)
    answer = complete(client, max_tokens=5, temperature=0, seed=7, stop=["x", "y"], stop_token_ids=[3], top_k=-1)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "ada"
    assert answer["choices"] == [
        {"index": 0, "text": "yes", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    asked = engine.requests[0]
    assert (asked.prompt, asked.adapter, asked.tenant, asked.route) == (ids("hey"), "ada", "everyone", None)
    sampling = asked.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.seed, sampling.top_k) == (5, 0.0, 7, 0)
    assert (sampling.stop, sampling.stop_token_ids) == (("x", "y"), (3,))


def test_a_stream_is_the_same_text_with_usage_at_its_end(client: TestClient, engine: FakeEngine) -> None:
    engine.script = lambda request: spelled("yes")
    body = {"model": "base", "prompt": "hey", "stream": True, "stream_options": {"include_usage": True}}
    response = client.post("/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = streamed(response.text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == "yes"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, "stop"]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 3
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert engine.requests[0].adapter is None


def test_a_chat_goes_through_the_template(client: TestClient, engine: FakeEngine) -> None:
    engine.script = lambda request: spelled("hi")
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    response = client.post("/v1/chat/completions", json={"model": "ada", "messages": messages})
    choice = response.json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "hi"}
    expected = ids("system: be kind\nuser: a\nb\nassistant: ")
    assert engine.requests[0].prompt == expected
    # Without a limit, up to the number of positions.
    assert engine.requests[0].sampling.max_tokens == 128 - len(expected)

    body = {"model": "ada", "messages": messages, "stream": True, "max_completion_tokens": 4}
    chunks = streamed(client.post("/v1/chat/completions", json=body).text)
    assert [chunk["object"] for chunk in chunks] == ["chat.completion.chunk"] * 2
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "h"}
    assert chunks[1]["choices"][0]["delta"] == {"content": "i"}
    assert engine.requests[1].sampling.max_tokens == 4


@pytest.mark.parametrize(("n", "held"), [(1, 80), (2, 32)])
def test_a_chat_without_a_limit_fits_a_small_cache(client: TestClient, engine: FakeEngine, n: int, held: int) -> None:
    """5 pages of 16 tokens hold fewer tokens than the 128 positions."""
    engine.pages = 5
    body = {"model": "ada", "messages": [{"role": "user", "content": ""}], "n": n}
    client.post("/v1/chat/completions", json=body)
    request = engine.requests[0]
    assert len(request.prompt) + request.sampling.max_tokens == held
    assert n * -(-held // 16) <= 5 < n * -(-(held + 1) // 16)
    cards = client.get("/v1/models").json()["data"]
    assert [card["max_model_len"] for card in cards] == [80] * 3


def test_null_is_an_absent_field(client: TestClient, engine: FakeEngine) -> None:
    absent = complete(client, use_beam_search=True, n=2)
    nulls = ["stream", "temperature", "top_p", "logprobs", "stream_options", "milora", "echo", "tools", "suffix"]
    null = complete(client, use_beam_search=True, n=2, **dict.fromkeys(nulls))
    assert engine.requests[0].sampling == engine.requests[1].sampling
    assert null["choices"] == absent["choices"]
    complete(client, n=None, milora={"route": None}, stream_options=None)
    assert engine.requests[2].sampling.n == 1
    # An explicit null of this field stands for all remaining positions.
    complete(client, max_tokens=None)
    assert [request.sampling.max_tokens for request in engine.requests] == [16, 16, 16, 125]


def test_an_answers_message_is_a_message_again(client: TestClient, engine: FakeEngine) -> None:
    """The fields of `message.model_dump()` of OpenAI's client."""
    unused = dict.fromkeys(["refusal", "annotations", "audio", "function_call", "tool_calls", "name"])
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for each in (messages, [{**message, **unused} for message in messages]):
        body = {"model": "ada", "messages": each, "n": None, "logprobs": None, "max_tokens": None, "tools": None}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert engine.requests[0].prompt == engine.requests[1].prompt
    assert engine.requests[0].sampling == engine.requests[1].sampling
    for wrong in ({"content": None}, {"tool_calls": [{"id": "x"}]}, {"refusal": "no"}):
        body = {"model": "ada", "messages": [{**messages[1], **wrong}]}
        assert client.post("/v1/chat/completions", json=body).status_code == 400


def test_several_prompts_and_several_texts_have_their_places(client: TestClient, engine: FakeEngine) -> None:
    engine.script = lambda request: [
        *spelled("a" * len(request.prompt), index=1, finish="length"),
        *spelled("b" * len(request.prompt), index=0),
    ]
    answer = complete(client, prompt=["x", "yy", "zzz"], n=2)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert [choice["text"] for choice in answer["choices"]] == ["b", "a", "bb", "aa", "bbb", "aaa"]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "length"] * 3
    assert answer["usage"]["prompt_tokens"] == 6
    assert answer["usage"]["completion_tokens"] == 12

    texts = dict.fromkeys(range(4), "")
    body = {"model": "ada", "prompt": [[1], [2, 3]], "n": 2, "stream": True}
    for chunk in streamed(client.post("/v1/completions", json=body).text):
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == {0: "b", 1: "a", 2: "bb", 3: "aa"}


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_completions(client: TestClient, engine: FakeEngine, stream: bool) -> None:
    engine.script = lambda request: spelled("yes")
    body = {"model": "ada", "prompt": "hey", "logprobs": 2, "stream": stream}
    response = client.post("/v1/completions", json=body)
    answers = streamed(response.text) if stream else [response.json()]
    found: dict[str, list[Any]] = {}
    for answer in answers:
        for name, values in answer["choices"][0]["logprobs"].items():
            found.setdefault(name, []).extend(values)
    assert found == {
        "tokens": ["y", "e", "s"],
        "token_logprobs": [-0.5] * 3,
        # JSON has no minus infinity.
        "top_logprobs": [{"a": -9999.0, character: -0.5} for character in "yes"],
        "text_offset": [0, 1, 2],
    }
    assert engine.requests[0].sampling.logprobs == 2


def test_logprobs_of_chats(client: TestClient, engine: FakeEngine) -> None:
    engine.script = lambda request: spelled("y")
    body = {"model": "ada", "messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 1}
    answer = client.post("/v1/chat/completions", json=body).json()
    y = {"token": "y", "logprob": -0.5, "bytes": [121]}
    a = {"token": "a", "logprob": -9999.0, "bytes": [97]}
    assert answer["choices"][0]["logprobs"] == {"content": [{**y, "top_logprobs": [y, a]}]}


def test_a_route_is_returned_and_followed(client: TestClient, engine: FakeEngine) -> None:
    engine.script = lambda request: spelled("yes", route=ROUTE if request.return_route else None)
    given = complete(client, milora={"route": True}, n=1)["choices"][0]["milora"]["route"]
    assert given == ROUTE.to_dict()
    assert engine.requests[0].route is None

    complete(client, milora={"route": given})
    assert engine.requests[1].route == ROUTE
    assert "milora" not in complete(client)["choices"][0]
    assert not engine.requests[2].return_route

    body = {"model": "ada", "prompt": "hey", "milora": {"route": True}, "stream": True}
    choices = [chunk["choices"][0] for chunk in streamed(client.post("/v1/completions", json=body).text)]
    assert choices[0]["milora"] == {"route": ROUTE.to_dict()}
    assert not any("milora" in choice for choice in choices[1:])


def test_pieces_without_text_are_no_chunks(client: TestClient, engine: FakeEngine) -> None:
    engine.script = lambda request: [
        TokenEvent(0, "", (5,)),
        TokenEvent(0, "\N{SNOWMAN}", (6,)),
        TokenEvent(0, "", (7,), finish_reason="length"),
    ]
    body = {"model": "ada", "messages": [{"role": "user", "content": "a"}], "stream": True}
    chunks = streamed(client.post("/v1/chat/completions", json=body).text)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": "\N{SNOWMAN}"},
        {"content": ""},
    ]
    assert complete(client)["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("error", "status", "code", "retry"),
    [
        (QueueFullError("full"), 429, "queue_full", "1"),
        (DeadlineError("late"), 503, "queue_timeout", "1"),
        (EngineStoppedError("over"), 503, "engine_stopped", "1"),
        (NumericalError("NaN"), 500, "numerical_error", None),
        (AdapterError("/secret/place is broken"), 503, "adapter_unavailable", "1"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["submit", "first", "later"])
def test_errors_of_the_engine(
    client: TestClient,
    engine: FakeEngine,
    error: Exception,
    status: int,
    code: str,
    retry: str | None,
    stream: bool,
    when: str,
) -> None:
    if when == "submit":
        engine.refusal = error
    else:
        engine.script = lambda request: [*(spelled("a", finish=None) if when == "later" else ()), error]
    response = client.post("/v1/completions", json={"model": "ada", "prompt": "hey", "stream": stream})
    assert "secret" not in response.text
    if stream and when == "later":
        # The status has already been sent.
        assert response.status_code == 200
        assert streamed(response.text)[-1]["error"]["code"] == code
        return
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert response.headers.get("retry-after") == retry


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"echo": True}, "echo", "not supported"),
        ({"milora": {"routes": 1}}, "milora.routes", "not supported"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 126}, None, "exceeds the model's 128 positions"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": ["a", ""]}, "prompt", "empty"),
        ({"prompt": [97]}, None, "embeddings for 97 tokens"),
        ({"prompt": ["a"] * 65}, "prompt", "at most 64"),
        ({"prompt": None}, "prompt", "required"),
        ({"prompt": 5}, "prompt", "valid string, or Input should be a valid list"),
        ({"prompt": [[1], [2], "a"]}, "prompt.2", "valid list"),
        ({"prompt": [[1], [2, -3]]}, "prompt.1.1", "greater than or equal to 0"),
        ({"prompt": ["a", "b", 5]}, "prompt.2", "valid string"),
        ({"prompt": [5, 6, "a"]}, "prompt.2", "valid integer"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": [""]}, "stop.0", "at least 1 character"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": ["a", 5]}, "stop.1", "valid string"),
        ({"str": 5}, "str", "not supported"),
        ({"milora": {"route": "x"}}, "milora.route", "valid boolean"),
        ({"milora": {"route": {"blocks": [], "experts": []}}}, "milora.route.gates", "required"),
        ({"milora": {"route": {"blocks": [], "experts": [], "gates": [], "x": 1}}}, "milora.route.x", "not supported"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stream_options": {"include_usage": True}}, None, "stream"),
        ({"use_beam_search": True, "top_p": 0.5}, None, "Beam search takes no top_p"),
        ({"milora": {"route": {"blocks": [], "experts": [], "gates": [[[1.0]]]}}}, None, "route"),
        ({"milora": {"route": {"blocks": ["a"], "experts": ["b", "c"], "gates": [[[1.0, 0.0], [1.0]]]}}}, None, "rect"),
    ],
)
def test_wrong_bodies(
    client: TestClient, engine: FakeEngine, change: dict[str, Any], param: str | None, said: str
) -> None:
    response = client.post("/v1/completions", json={"model": "ada", "prompt": "hey", **change})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert said in error["message"]
    if param is not None:
        assert error["param"] == param
    assert engine.requests == []


@pytest.mark.parametrize(
    "content", [b"{", b"[" * 100_000, b'{"model": "ada", "prompt": "\\ud800"}', b"\xff", b"null", b"", b'{"n": 1e999}']
)
def test_bodies_that_are_no_json_or_no_text(client: TestClient, content: bytes) -> None:
    response = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hey", "messages"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": 5}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "messages.0.content.0.type"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text"}]}], "messages.0.content.1.text"),
    ],
)
def test_wrong_messages(client: TestClient, messages: Any, param: str) -> None:
    response = client.post("/v1/chat/completions", json={"model": "ada", "messages": messages})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_a_template_that_refuses(make_service: Any, engine: FakeEngine) -> None:
    service = make_service()
    tokenizer = character_tokenizer()
    for template in ("{{ raise_exception('no system') }}", "{{ messages[0].content.missing() }}", None):
        tokenizer.chat_template = template
        service._prompts._own = tokenizer
        body = {"model": "base", "messages": [{"role": "user", "content": "a"}]}
        response = TestClient(build_app(service)).post("/v1/chat/completions", json=body)
        assert response.status_code == 400
        assert "template" in response.json()["error"]["message"]


def test_low_temperatures_are_raised_and_beams_are_greedy(client: TestClient, engine: FakeEngine) -> None:
    complete(client, temperature=1e-30)
    complete(client, use_beam_search=True, n=2)
    complete(client)
    assert [request.sampling.temperature for request in engine.requests] == [0.01, 0.0, 1.0]


def test_a_body_that_is_too_large(make_service: Any) -> None:
    small = TestClient(build_app(make_service(body_bytes=1000)))
    response = small.post("/v1/completions", json={"model": "ada", "prompt": "x" * 1000})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"


def test_an_unexpected_failure_says_nothing_of_the_prompt(
    client: TestClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.refusal = RuntimeError("the secret prompt")
    with caplog.at_level("INFO", "milora.serving"):
        response = client.post("/v1/completions", json={"model": "ada", "prompt": "secret prompt"})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    lines = [JsonFormatter().format(record) for record in caplog.records]
    assert any("RuntimeError" in line and "fake_engine.py" in line for line in lines)
    assert not any("secret" in line for line in [*lines, response.text])
