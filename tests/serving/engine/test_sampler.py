"""The sampler against transformers' warpers and frequencies; the detokeniser against decoding all tokens at once."""

import random

import pytest
import torch
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from milora.serving.engine import sampler as sampler_module
from milora.serving.engine.detokenizer import Detokenizer
from milora.serving.engine.sampler import Sampler, kept_tokens
from milora.serving.requests import Sampling


@pytest.mark.parametrize("most_sorted", [4, 1024])
@pytest.mark.parametrize("top_k", [0, 3, 20])
@pytest.mark.parametrize("top_p", [0.2, 0.9, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.1])
def test_cuts_keep_what_transformers_warpers_keep(
    monkeypatch: pytest.MonkeyPatch, most_sorted: int, top_k: int, top_p: float, min_p: float
) -> None:
    monkeypatch.setattr(sampler_module, "MOST_SORTED", most_sorted)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = torch.randn(50, generator=generator) * 3
        expected = logits[None]
        # In vLLM's order.
        for is_on, warper in (
            (min_p > 0, lambda: MinPLogitsWarper(min_p)),
            (top_k > 0, lambda: TopKLogitsWarper(top_k)),
            (top_p < 1, lambda: TopPLogitsWarper(top_p)),
        ):
            expected = warper()(None, expected) if is_on else expected
        tokens, probabilities = kept_tokens(logits, Sampling(1, top_k=top_k, top_p=top_p, min_p=min_p))
        assert set(tokens.tolist()) == set(expected[0].isfinite().nonzero()[:, 0].tolist())
        shares = expected[0].softmax(0)[tokens]
        torch.testing.assert_close(probabilities / probabilities.sum(), shares, atol=1e-5, rtol=1e-4)


def test_draws_have_the_models_frequencies() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    sampler = Sampler(Sampling(1, temperature=0.5, seed=0), 0)
    drawn = torch.bincount(torch.tensor([sampler.draw(logits, (), ()) for _ in range(4000)]), minlength=4) / 4000
    torch.testing.assert_close(drawn, (logits / 0.5).softmax(0), atol=0.02, rtol=0)


class Bytes:
    """A tokenizer with bytes as tokens, so a character can need several."""

    @staticmethod
    def decode(tokens: list[int], skip_special_tokens: bool) -> str:
        return bytes(token for token in tokens if token).decode("utf-8", errors="replace")


@pytest.mark.parametrize("seed", range(5))
def test_pieces_add_up_to_the_text_and_end_with_whole_characters(seed: int) -> None:
    generator = random.Random(seed)
    text = "".join(generator.choice("aß€𝄞 \n日") for _ in range(60))
    detokenizer = Detokenizer(Bytes())
    tokens = list(text.encode())
    for place in sorted(generator.sample(range(len(tokens)), 10), reverse=True):
        tokens.insert(place, 0)  # A special token in between.
    pieces = [detokenizer.add(token) for token in tokens]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "".join(pieces) + detokenizer.finish() == text


def test_a_text_that_ends_inside_a_character_says_so() -> None:
    detokenizer = Detokenizer(Bytes())
    pieces = [detokenizer.add(token) for token in "a€".encode()[:-1]]
    assert pieces == ["a", "", ""]
    assert detokenizer.finish() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("seed", range(20))
def test_stop_texts_are_found_where_a_search_of_the_whole_text_finds_them(seed: int) -> None:
    generator = random.Random(seed)
    text = "".join(generator.choice("ab€") for _ in range(40))
    stops = tuple("".join(generator.choice("ab€") for _ in range(generator.randrange(2, 5))) for _ in range(2))
    detokenizer = Detokenizer(Bytes(), stops)
    shown = ""
    for token in text.encode():
        shown += detokenizer.add(token)
        if detokenizer.stopped_by is not None:
            break
    shown += detokenizer.finish()
    ends = [(text.index(stop) + len(stop), text.index(stop), stop) for stop in stops if stop in text]
    assert detokenizer.stopped_by == (min(ends)[2] if ends else None)
    assert shown == (text[: min(ends)[1]] if ends else text)


def test_text_that_cannot_begin_a_stop_text_is_shown_at_once() -> None:
    detokenizer = Detokenizer(Bytes(), ("xyz",))
    assert [detokenizer.add(token) for token in b"abxyabx"] == ["a", "b", "", "", "xya", "b", ""]
    assert detokenizer.finish() == "x"
