"""Scores of the lm-eval model against an unpadded forward pass with the context's route."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from support import methods
from support.adapted import adapted
from support.architectures import ARCHITECTURES
from support.tokenizer import character_tokenizer, save_backbone

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'milora[eval]'")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from milora.evaluation.lm_eval.model import MiLoraLM
from milora_core.errors import MiLoraError

QUESTIONS = [
    "Which gas do plants take in?",
    "What is 3 + 4?",
    "Is iron a metal? Think of magnets, rust, and of the bridges that stand in every larger city.",
]
CHOICES = [" oxygen", " B", " carbon dioxide", " C", " seven and a half", " no"]
PAIRS = [(question, choice) for question in QUESTIONS for choice in CHOICES]
END = character_tokenizer().eos_token_id


def harness(model: Any, kind: type[HFLM] = MiLoraLM, *, chat: bool = False, **settings: Any) -> Any:
    return kind(pretrained=model, tokenizer=character_tokenizer(chat=chat), **{"batch_size": 4, **settings})


def requests(pairs: list[Any], kind: str = "loglikelihood") -> list[Instance]:
    return [Instance(kind, {}, pair if isinstance(pair, tuple) else (pair,), 0) for pair in pairs]


def characters(text: str) -> list[int]:
    return character_tokenizer().encode(text, add_special_tokens=False)


def on_route(model: PeftModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Scores one unpadded row: computes the context's route, then uses it for the whole row."""
    route = model.route(torch.tensor([context]))
    with torch.no_grad(), model.use_route(route):
        scores = model(torch.tensor([context + continuation])).logits.log_softmax(-1)[0, len(context) - 1 : -1]
    wanted = torch.tensor(continuation)
    return float(scores[torch.arange(len(wanted)), wanted].sum()), bool((scores.argmax(-1) == wanted).all())


def assert_same(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-3, rel=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return adapted("llama", seed=2).model


@pytest.fixture(scope="module")
def expected(model: PeftModel) -> list[tuple[float, bool]]:
    return [on_route(model, characters(context), characters(choice)) for context, choice in PAIRS]


@pytest.mark.parametrize("batch_size", [1, 4, "auto"])
@pytest.mark.parametrize("logits_cache", [True, False])
def test_scores_follow_the_route_of_the_context(
    model: PeftModel, expected: list[tuple[float, bool]], batch_size: int | str, logits_cache: bool
) -> None:
    lm = harness(model, batch_size=batch_size, max_batch_size=8, max_length=128, logits_cache=logits_cache)
    assert_same(lm.loglikelihood(requests(PAIRS), disable_tqdm=True), expected)


def test_the_naive_concatenation_takes_another_route_and_other_scores(
    model: PeftModel, expected: list[tuple[float, bool]]
) -> None:
    def chosen(tokens: list[int]) -> torch.Tensor:
        return model.route(torch.tensor([tokens])).gates > 0

    rerouted = [
        not torch.equal(chosen(characters(context)), chosen(characters(context + choice))) for context, choice in PAIRS
    ]
    naive = harness(model, HFLM).loglikelihood(requests(PAIRS), disable_tqdm=True)
    moved = [abs(one - other) > 1e-2 for (one, _), (other, _) in zip(naive, expected, strict=True)]
    assert any(rerouted)
    assert any(moved)
    # A single row reads no padding either. Its score changes because its route does.
    row = rerouted.index(True)
    ((alone, _),) = harness(model, HFLM, batch_size=1).loglikelihood(requests([PAIRS[row]]), disable_tqdm=True)
    assert abs(alone - expected[row][0]) > 1e-3


def test_the_same_tokens_cut_elsewhere_have_another_prompt(model: PeftModel) -> None:
    text = QUESTIONS[0] + " oxygen"
    pairs = [(text[:cut], text[cut:]) for cut in (5, 12, len(QUESTIONS[0]), len(text) - 1)]
    # lm-eval moves spaces from the end of a context to the continuation.
    assert not any(context.endswith(" ") for context, _ in pairs)
    found = harness(model).loglikelihood(requests(pairs), disable_tqdm=True)
    assert_same(found, [on_route(model, characters(context), characters(rest)) for context, rest in pairs])


@settings(max_examples=15, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.integers(1, 90), min_size=1, max_size=9), st.lists(st.integers(1, 90), min_size=1, max_size=5)
        ),
        min_size=1,
        max_size=7,
    ),
    batch_size=st.integers(1, 4),
)
def test_any_lengths_in_any_order(rows: list[tuple[list[int], list[int]]], batch_size: int) -> None:
    model = SHARED.model
    lm = harness(model, batch_size=batch_size)
    found = lm._loglikelihood_tokens([(None, *row) for row in rows], disable_tqdm=True)
    assert_same(found, [on_route(model, context, continuation) for context, continuation in rows])


SHARED = adapted("llama")


def test_choices_of_one_token_share_a_pass(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = harness(model, batch_size=1)
    passes = 0
    call = lm._model_call

    def count(*args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        passes += 1
        return call(*args, **kwargs)

    monkeypatch.setattr(lm, "_model_call", count)
    pairs = [(question, letter) for question in QUESTIONS for letter in "ABCD"]
    found = lm.loglikelihood(requests(pairs), disable_tqdm=True)
    assert passes == len(QUESTIONS)
    assert_same(found, [on_route(model, characters(context), characters(letter)) for context, letter in pairs])


def test_a_context_that_is_cut_on_the_left_is_routed_on_what_is_left(
    model: PeftModel, caplog: pytest.LogCaptureFixture
) -> None:
    lm = harness(model, max_length=40)
    pairs = [(QUESTIONS[2], " yes"), (QUESTIONS[1], " seven")]
    found = lm.loglikelihood(requests(pairs), disable_tqdm=True)
    kept = characters(QUESTIONS[2])[-(41 - len(" yes")) :]
    assert_same(
        found,
        [on_route(model, kept, characters(" yes")), on_route(model, characters(QUESTIONS[1]), characters(" seven"))],
    )
    assert "1 of 2 requests are longer" in caplog.text


def test_an_empty_context_is_the_prefix_token(model: PeftModel) -> None:
    found = harness(model).loglikelihood(requests([("", "metal"), ("", "iron bridge")]), disable_tqdm=True)
    assert_same(found, [on_route(model, [END], characters(text)) for text in ("metal", "iron bridge")])


def test_rolling_texts_are_routed_on_the_token_before_each_window(model: PeftModel) -> None:
    text = "A text of twenty-six letters"
    tokens = characters(text)
    found = harness(model, max_length=12).loglikelihood_rolling(requests([text, "short"]), disable_tqdm=True)
    # Windows of 12, 12 and 4 tokens without overlap. The last reads a full window, up to the token before its own.
    first = on_route(model, [END], tokens[:12])[0]
    second = on_route(model, tokens[11:12], tokens[12:24])[0]
    assert len(tokens) == 28
    last = on_route(model, tokens[15:24], tokens[24:])[0]
    assert found == pytest.approx([first + second + last, on_route(model, [END], characters("short"))[0]], abs=1e-3)


def test_generation_is_routed_on_the_prompt_whatever_the_batch(model: PeftModel) -> None:
    wanted = {"until": ["\n\n"], "max_gen_toks": 8}
    found = harness(model, batch_size=3).generate_until(
        [Instance("generate_until", {}, (question, dict(wanted)), 0) for question in QUESTIONS], disable_tqdm=True
    )
    for question, text in zip(QUESTIONS, found, strict=True):
        prompt = torch.tensor([characters(question)])
        with model.use_route(model.route(prompt)):
            tokens = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
        assert text == character_tokenizer().decode(tokens, skip_special_tokens=True).split("\n\n")[0]


def test_a_chat_template_is_part_of_the_prompt(model: PeftModel) -> None:
    lm = harness(model, chat=True)
    context = lm.apply_chat_template([{"role": "user", "content": "Is iron a metal?"}])
    assert context == "user: Is iron a metal?\nassistant: "
    found = lm.loglikelihood(requests([(context, "yes")]), disable_tqdm=True)
    # The trailing space of the context moves to the continuation.
    assert_same(found, [on_route(model, characters(context[:-1]), characters(" yes"))])


@pytest.mark.parametrize("method", [name for name in methods.METHODS if name != "moelora-task"])
def test_every_method_scores_as_without_padding(method: str) -> None:
    model = methods.adapted(method, "llama")
    found = harness(model).loglikelihood(requests(PAIRS[::3]), disable_tqdm=True)
    for (context, choice), answer in zip(PAIRS[::3], found, strict=True):
        tokens, length = characters(context + choice), len(characters(context))
        # Supervised tokens are not prompt; labels tell methods that read prompts where the prompt ends.
        labels = torch.tensor([[-100] * length + tokens[length:]])
        with torch.no_grad():
            scores = model(torch.tensor([tokens]), labels=labels).logits.log_softmax(-1)[0, length - 1 : -1]
        wanted = torch.tensor(tokens[length:])
        total = float(scores[torch.arange(len(wanted)), wanted].sum())
        assert_same([answer], [(total, bool((scores.argmax(-1) == wanted).all()))])


def test_iapt_reads_the_context_alone() -> None:
    model = methods.adapted("iapt", "llama")
    ours, naive = (
        [score for score, _ in harness(model, kind, batch_size=1).loglikelihood(requests(PAIRS), disable_tqdm=True)]
        for kind in (MiLoraLM, HFLM)
    )
    assert ours != pytest.approx(naive, abs=1e-2)


@pytest.mark.parametrize("adapter", [False, True])
def test_without_a_router_scores_are_those_of_lm_eval(adapter: bool) -> None:
    model: Any = ARCHITECTURES["llama"]().eval()
    if adapter:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    ours, theirs = (harness(model, kind).loglikelihood(requests(PAIRS), disable_tqdm=True) for kind in (MiLoraLM, HFLM))
    assert_same(ours, theirs)


def test_loads_the_backbone_that_the_adapter_names(tmp_path: Any, model: PeftModel) -> None:
    base = save_backbone(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    loaded = MiLoraLM(peft=str(tmp_path / "adapter"), batch_size=2)
    assert_same(
        loaded.loglikelihood(requests(PAIRS[:3]), disable_tqdm=True),
        [on_route(model, characters(context), characters(choice)) for context, choice in PAIRS[:3]],
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pretrained=BACKBONE"),
        ({"pretrained": "tinny/of/nowhere"}, "no such backbone"),
        ({"pretrained": "tiny", "peft": "nowhere"}, "no such adapter"),
        ({"pretrained": "owner/not-cached"}, "owner/not-cached"),
        ({"pretrained": "tiny", "backend": "seq2seq"}, "decoder-only"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_said(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(MiLoraError, match=message):
        MiLoraLM(**arguments)
