import pytest
import torch
from peft import PeftModel
from support.adapted import adapted, assert_nothing_in_force
from support.architectures import ARCHITECTURES
from support.tokenizer import END, character_tokenizer

from milora.backbone.loading import load_adapter
from milora.inference.generation import Decoding, batches, encode_prompt, generate_texts, left_padded
from milora_core.errors import MiLoraError

PROMPTS = ["Hello", "What is the capital of it?", "no", "Three words here"]


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return adapted("llama").model


def texts(model: PeftModel, prompts: list, decoding: Decoding, **arguments: object) -> list[str]:
    generated = {
        text.index: text.text for text in generate_texts(model, character_tokenizer(), prompts, decoding, **arguments)
    }
    return [generated[index] for index in range(len(prompts))]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_gives_each_prompt_what_it_gets_alone(model: PeftModel, beams: int) -> None:
    decoding = Decoding(max_new_tokens=6, beams=beams)
    together = texts(model, PROMPTS, decoding, batch_size=4)
    assert together == [texts(model, [prompt], decoding)[0] for prompt in PROMPTS]
    assert len(set(together)) > 1
    tokenizer = character_tokenizer()
    expected = model.generate(
        **tokenizer(PROMPTS[0], return_tensors="pt", return_token_type_ids=False), max_new_tokens=6, num_beams=beams
    )
    assert together[0] == tokenizer.decode(expected[0, len(PROMPTS[0]) :])


def test_each_prompt_is_served_by_its_adapter_and_the_model_is_left_as_it_was(tmp_path) -> None:
    model = adapted("llama").model
    adapted("llama", seed=1).model.save_pretrained(tmp_path)
    load_adapter(model, tmp_path, "other")
    model.train()
    decoding = Decoding(max_new_tokens=6, beams=2)
    names = ["other", "default", "other", "default"]
    mixed = texts(model, PROMPTS, decoding, adapters=names)
    assert model.active_adapter == "default"
    assert model.training
    assert [mixed[1], mixed[3]] == texts(model, [PROMPTS[1], PROMPTS[3]], decoding)
    model.set_adapter("other")
    assert [mixed[0], mixed[2]] == texts(model, [PROMPTS[0], PROMPTS[2]], decoding)
    with pytest.raises(MiLoraError, match="'none'"):
        generate_texts(model, character_tokenizer(), ["x"], decoding, adapters=["none"])


def test_a_text_ends_at_an_end_token_of_the_backbone() -> None:
    model = ARCHITECTURES["llama"]()
    decoding = Decoding(max_new_tokens=6, beams=1)
    (whole,) = generate_texts(model, character_tokenizer(), ["Hello"], decoding)
    assert whole.tokens == 6
    model.generation_config.eos_token_id = character_tokenizer()(whole.text[2])["input_ids"]
    (cut,) = generate_texts(model, character_tokenizer(), ["Hello"], decoding)
    assert cut.tokens == whole.text.index(whole.text[2]) + 1
    assert whole.text.startswith(cut.text)


def test_sampling_draws(model: PeftModel) -> None:
    decoding = Decoding(max_new_tokens=6, beams=1, temperature=5.0, top_p=0.99)
    assert len({texts(model, ["Hello"], decoding)[0] for _ in range(3)}) > 1


def test_prompts_are_encoded_as_training_encodes_them() -> None:
    tokenizer = character_tokenizer(chat=True)
    plain = tokenizer("Hello")["input_ids"]
    assert encode_prompt(tokenizer, "Hello") == plain
    # TRL keeps the common prefix of prompt and prompt + completion, which excludes an appended end token.
    assert encode_prompt(character_tokenizer(appends_end=True), "Hello") == plain
    assert encode_prompt(character_tokenizer(appends_end=True), "Hello<eos>")[-1] == END
    messages = [{"role": "user", "content": "Hello"}]
    assert tokenizer.decode(encode_prompt(tokenizer, messages)) == "user: Hello\nassistant: "
    with pytest.raises(MiLoraError, match="chat template"):
        encode_prompt(character_tokenizer(), messages)
    with pytest.raises(MiLoraError, match="no tokens"):
        encode_prompt(tokenizer, "")


def test_batches_are_of_one_group_and_the_longest_come_first() -> None:
    encoded = [[1] * length for length in (3, 9, 5, 7)]
    assert batches(encoded, 2) == [[1, 3], [2, 0]]
    assert batches(encoded, 2, ["a", "b", "a", "a"]) == [[3, 2], [0], [1]]
    padded = left_padded([[5, 6], [7]], 0, "cpu")
    assert padded["input_ids"].tolist() == [[5, 6], [0, 7]]
    assert padded["attention_mask"].tolist() == [[1, 1], [0, 1]]
    with pytest.raises(MiLoraError, match="batch_size"):
        batches(encoded, 0)


@pytest.mark.parametrize(
    "values", [{"max_new_tokens": 0}, {"beams": 0}, {"temperature": 0.0, "beams": 1}, {"top_p": 1.5}, {"top_p": 0.5}]
)
def test_a_decoding_out_of_range_is_refused(values: dict) -> None:
    with pytest.raises(MiLoraError, match=next(iter(values))):
        Decoding(**values)


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_generated(model: PeftModel) -> None:
    with pytest.raises(MiLoraError, match="128 positions"):
        generate_texts(model, character_tokenizer(), ["fits", "x" * 127], Decoding(max_new_tokens=2))


@pytest.mark.parametrize("beams", [1, 3])
def test_a_text_comes_with_the_route_that_served_it(beams: int) -> None:
    case = adapted("llama")
    tokenizer = character_tokenizer()
    made = generate_texts(case.model, tokenizer, PROMPTS, Decoding(max_new_tokens=3, beams=beams), batch_size=3)
    for text in made:
        assert text.route is not None
        expected = case.reference.route(tokenizer(PROMPTS[text.index], return_tensors="pt")["input_ids"])
        torch.testing.assert_close(text.route.gates[:, 0], expected.gates)
        torch.testing.assert_close(text.route.probabilities[:, 0], expected.probabilities, rtol=1e-4, atol=1e-5)
    assert_nothing_in_force(case.model)


def test_a_model_without_routers_has_no_route(model: PeftModel) -> None:
    decoding = Decoding(max_new_tokens=2, beams=1)
    assert next(iter(generate_texts(ARCHITECTURES["llama"](), character_tokenizer(), ["x"], decoding))).route is None
    with model.disable_adapter():
        assert next(iter(generate_texts(model, character_tokenizer(), ["x"], decoding))).route is None
