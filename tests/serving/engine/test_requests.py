"""Request options: sampling, penalties, stops, several texts, log-probabilities, routes, cancelling."""

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.tenants import Alone, engine_on, greedy, prompt_of, read, saved_adapters
from support.tokenizer import CHARACTERS, END, character_tokenizer

from milora import Route
from milora.serving.engine import Engine
from milora.serving.requests import (
    GenerationRequest,
    InvalidRequestError,
    PromptTooLongError,
    Sampling,
    ServingError,
    UnknownAdapterError,
)

KINDS = {"milora": {}, "soft": {"gate": "softmax", "pooler": "mean"}, "late": {"adapted_tokens": "completion"}}
PROMPT = prompt_of(random.Random(3), 12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return saved_adapters(tmp_path_factory.mktemp("adapters"), "llama", KINDS)


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> Alone:
    torch.set_num_threads(1)
    return Alone("llama", folders)


@pytest.fixture(scope="module")
def engine(folders: dict[str, Path], alone: Alone) -> Iterator[Engine]:
    with engine_on("llama", folders) as engine:
        yield engine


def text_of(tokens: list[int]) -> str:
    return character_tokenizer().decode(tokens, skip_special_tokens=True)


def test_events_give_tokens_one_by_one_and_the_text(engine: Engine, alone: Alone) -> None:
    answer = read(engine.submit(greedy(PROMPT, "milora", 9)))
    expected = alone("milora", PROMPT, 9)
    assert [event.tokens for event in answer.events] == [(token,) for token in expected]
    assert answer.texts == [text_of(expected)]
    assert answer.reasons == [("length", None)]


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.4}, {"repetition_penalty": 0.6}])
def test_penalties_equal_generates(engine: Engine, alone: Alone, options: dict[str, float]) -> None:
    answer = read(engine.submit(greedy(PROMPT, "soft", 16, **options)))
    assert answer.tokens == [alone("soft", PROMPT, 16, **options)]


def test_presence_and_frequency_are_subtracted_by_count(engine: Engine, alone: Alone) -> None:
    """Penalties computed by hand from the model's own logits after the text so far."""
    answer = read(engine.submit(greedy(PROMPT, None, 12, presence_penalty=0.7, frequency_penalty=1.1)))
    model, text = alone.model(None), []
    for token in answer.tokens[0]:
        with torch.no_grad():
            logits = model(torch.tensor([[*PROMPT, *text]])).logits[0, -1]
        for seen, count in Counter(text).items():
            logits[seen] -= 0.7 + 1.1 * count
        assert token == int(logits.argmax())
        text.append(token)


def test_seeds_repeat_texts_whatever_runs_beside(engine: Engine) -> None:
    request = GenerationRequest(PROMPT, Sampling(20, temperature=1.5, seed=11, ignore_eos=True), "late")
    first = read(engine.submit(request)).tokens
    others = [engine.submit(greedy(PROMPT[:size], "soft", 30)) for size in (3, 5, 7)]
    assert read(engine.submit(request)).tokens == first
    for other in others:
        read(other)
    without_seed = GenerationRequest(PROMPT, Sampling(20, temperature=1.5, ignore_eos=True), "late")
    assert len({tuple(read(engine.submit(without_seed)).tokens[0]) for _ in range(4)}) > 1


def test_several_texts_are_drawn_apart_from_one_prompt(engine: Engine) -> None:
    request = GenerationRequest(PROMPT, Sampling(15, temperature=2.0, seed=1, n=4, ignore_eos=True), "milora")
    answer = read(engine.submit(request))
    assert len(answer.tokens) == 4
    assert [len(tokens) for tokens in answer.tokens] == [15] * 4
    assert len({tuple(tokens) for tokens in answer.tokens}) == 4
    alone = GenerationRequest(PROMPT, Sampling(15, temperature=2.0, seed=1, ignore_eos=True), "milora")
    assert read(engine.submit(alone)).tokens[0] == answer.tokens[0]
    second = GenerationRequest(PROMPT, Sampling(15, temperature=2.0, seed=2, ignore_eos=True), "milora")
    assert read(engine.submit(second)).tokens[0] == answer.tokens[1]


def test_greedy_copies_are_equal(engine: Engine, alone: Alone) -> None:
    answer = read(engine.submit(greedy(PROMPT, "late", 10, n=3)))
    assert answer.tokens == [alone("late", PROMPT, 10)] * 3


def test_logprobs_are_the_models(engine: Engine, alone: Alone) -> None:
    answer = read(engine.submit(greedy(PROMPT, "milora", 6, logprobs=3, temperature=0.0, frequency_penalty=0.5)))
    model, text = alone.model("milora"), list(answer.tokens[0])
    route = model.route(torch.tensor([PROMPT]))
    with torch.no_grad(), model.use_route(route):
        logits = model(torch.tensor([[*PROMPT, *text]])).logits[0, len(PROMPT) - 1 : -1]
    expected = logits.log_softmax(dim=-1)
    for place, event in enumerate(answer.events):
        (found,) = event.logprobs or ()
        assert found.token == text[place]
        assert found.logprob == pytest.approx(float(expected[place, text[place]]), abs=1e-4)
        values, tokens = expected[place].topk(3)
        assert [token for token, _ in found.top] == tokens.tolist()
        assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_end_of_sequence_ends_a_text_unless_ignored(engine: Engine, alone: Alone) -> None:
    """Uses the first prompt whose text contains the end token."""
    generator = random.Random(0)
    prompts = (prompt_of(generator, 8) for _ in range(500))
    prompt, expected = next((p, found) for p in prompts if END in (found := alone(None, p, 20))[:-1])
    place = expected.index(END)
    answer = read(engine.submit(GenerationRequest(prompt, Sampling(20))))
    assert answer.tokens == [expected[: place + 1]]
    assert answer.reasons == [("stop", None)]
    assert answer.texts == [text_of(expected[:place])]
    assert read(engine.submit(greedy(prompt, None, 20))).tokens == [expected]


def test_stop_tokens_end_a_text(engine: Engine, alone: Alone) -> None:
    expected = alone("milora", PROMPT, 12)
    stop = expected[5]
    end = expected.index(stop)
    answer = read(engine.submit(greedy(PROMPT, "milora", 12, stop_token_ids=(stop,))))
    assert answer.tokens == [expected[: end + 1]]
    assert answer.reasons == [("stop", stop)]
    assert answer.texts == [text_of(expected[:end])]


@pytest.mark.parametrize("keep", [False, True])
def test_stop_texts_end_a_text_where_they_end(engine: Engine, alone: Alone, keep: bool) -> None:
    tokens = alone("soft", PROMPT, 20)
    whole = text_of(tokens)
    stop = whole[7:10]
    end = whole.index(stop)
    answer = read(engine.submit(greedy(PROMPT, "soft", 20, stop=("\x00never", stop), include_stop_str_in_output=keep)))
    assert answer.texts == [whole[: end + len(stop) if keep else end]]
    assert answer.reasons == [("stop", stop)]
    needed = next(count for count in range(20) if stop in text_of(tokens[:count]))
    assert answer.tokens == [tokens[:needed]]


def test_text_that_only_begins_a_stop_text_is_given_in_the_end(engine: Engine, alone: Alone) -> None:
    whole = text_of(alone("soft", PROMPT, 20))
    assert read(engine.submit(greedy(PROMPT, "soft", 20, stop=(whole[-2:] + "never",)))).texts == [whole]


@pytest.mark.parametrize("adapter", [None, "milora", "late"])
@pytest.mark.parametrize(
    ("beams", "length_penalty", "ends"),
    [(2, 1.0, ()), (3, 1.0, (END,)), (4, 0.0, (END, 7)), (4, 2.0, (3, 8, 12)), (3, -1.0, (5, 6))],
)
def test_beams_are_generates(
    folders: dict[str, Path],
    alone: Alone,
    adapter: str | None,
    beams: int,
    length_penalty: float,
    ends: tuple[int, ...],
) -> None:
    """Prompts of several lengths, so texts end at different times; few pages, so beams are preempted."""
    options = {"num_beams": beams, "num_return_sequences": beams, "length_penalty": length_penalty}
    generator = random.Random(beams)
    prompts = [prompt_of(generator, size) for size in (1, 6, 11, 16)]
    with engine_on("llama", folders, cache_bytes=40 * 2**10, step_tokens=16) as engine:
        sampling = Sampling(
            14,
            n=beams,
            use_beam_search=True,
            length_penalty=length_penalty,
            ignore_eos=True,
            stop_token_ids=ends,
        )
        running = [engine.submit(GenerationRequest(prompt, sampling, adapter)) for prompt in prompts]
        for prompt, generation in zip(prompts, running, strict=True):
            expected = alone.all(adapter, prompt, 14, eos_token_id=list(ends) or None, pad_token_id=0, **options)
            answer = read(generation)
            expected = [
                tokens[: min((tokens.index(end) + 1 for end in ends if end in tokens), default=14)]
                for tokens in expected
            ]
            assert answer.tokens == expected
            assert answer.reasons == [
                ("stop", tokens[-1]) if tokens[-1] in ends else ("length", None) for tokens in expected
            ]
            assert answer.texts == [text_of(tokens[:-1] if tokens[-1] in ends else tokens) for tokens in expected]


@pytest.mark.parametrize("adapter", ["milora", "soft", "late"])
def test_routes_are_returned_and_followed(engine: Engine, alone: Alone, adapter: str) -> None:
    expected = alone.model(adapter).route(torch.tensor([PROMPT]))
    answer = read(engine.submit(greedy(PROMPT, adapter, 5, return_route=True)))
    found = answer.events[0].route
    assert found is not None
    assert torch.equal(found.chosen, expected.chosen)
    torch.testing.assert_close(found.probabilities, expected.probabilities)
    assert all(event.route is None for event in answer.events[1:])
    other = alone.model(adapter).route(torch.tensor([PROMPT[::-1]]))
    forced = Route(other.gates.flip(2), other.probabilities.flip(2), other.experts, other.blocks)
    answer = read(engine.submit(greedy(PROMPT, adapter, 10, route=forced)))
    assert answer.tokens == [alone(adapter, PROMPT, 10, route=forced)]
    assert answer.tokens != [alone(adapter, PROMPT, 10)]


def test_a_route_of_another_model_is_refused(engine: Engine) -> None:
    foreign = Route(torch.ones(1, 1, 1), torch.ones(1, 1, 1), ("x",), ("model.layers.0",))
    with pytest.raises(ServingError, match="experts"):
        read(engine.submit(greedy(PROMPT, "milora", 3, route=foreign)))
    assert engine.healthy() is None


@pytest.mark.parametrize("adapter", [None, "lora", "dora"])
def test_a_route_without_routers_is_refused(engine: Engine, alone: Alone, adapter: str | None) -> None:
    route = alone.model("milora").route(torch.tensor([PROMPT]))
    with pytest.raises(InvalidRequestError, match="has no routers to follow a route"):
        engine.submit(greedy(PROMPT, adapter, 3, route=route))
    assert read(engine.submit(greedy(PROMPT, adapter, 3, return_route=True))).events


def test_cancelled_requests_free_their_rows(engine: Engine) -> None:
    running = [engine.submit(greedy(PROMPT, "milora", 100)) for _ in range(6)]
    next(running[0])
    for generation in running:
        generation.cancel()
        generation.cancel()
    for generation in running:
        assert len(list(generation)) < 100
    statistics = engine.statistics()
    assert (statistics.running, statistics.waiting, statistics.cache_pages_used) == (0, 0, 0)


def test_requests_from_threads_and_coroutines(engine: Engine, alone: Alone) -> None:
    async def one(size: int) -> list[int]:
        return [token async for event in engine.submit(greedy(PROMPT[:size], "soft", 9)) for token in event.tokens]

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*(one(size) for size in range(1, 9)))

    results: list[list[list[int]]] = []
    threads = [threading.Thread(target=lambda: results.append(asyncio.run(all_of_them()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [alone("soft", PROMPT[:size], 9) for size in range(1, 9)]
    assert results == [expected] * 3


def test_values_that_cannot_be_served_are_refused_at_once(engine: Engine) -> None:
    with pytest.raises(InvalidRequestError, match="no tokens"):
        engine.submit(greedy((), None, 3))
    with pytest.raises(InvalidRequestError, match="the token 97"):
        engine.submit(greedy((1, 97), None, 3))
    with pytest.raises(PromptTooLongError, match="128 positions"):
        engine.submit(greedy((1,) * 120, None, 9))
    with pytest.raises(UnknownAdapterError, match="did you mean 'milora'"):
        engine.submit(greedy(PROMPT, "milor", 3))
    with pytest.raises(InvalidRequestError, match="32 texts"):
        engine.submit(greedy(PROMPT, None, 3, n=33))
    for name, value in {"temperature": -1.0, "top_p": 0.0, "top_k": -1, "min_p": 2.0, "n": 0, "logprobs": 21}.items():
        with pytest.raises(InvalidRequestError, match=f"{name} must be"):
            Sampling(3, **{name: value})


def test_the_alphabet_of_the_tests_is_whole() -> None:
    assert text_of([1, 2, 3]) == "".join(CHARACTERS[:3])
