import math
from typing import Any

import pytest
import torch
from support.adapted import adapted
from support.architectures import ARCHITECTURES
from support.methods import adapted as adapted_by
from support.tokenizer import END, character_tokenizer

from milora.evaluation.perplexity import completion_perplexity, encode_example
from milora.tasks.task import Example
from milora_core.errors import MiLoraError

TOKENIZER = character_tokenizer()
ROWS = [
    Example("What is it", " a thing", "x"),
    Example("no", " yes", "x"),
    Example("Another, longer question", " b", "x"),
]


def by_hand(model: Any, **arguments: Any) -> tuple[float, int]:
    """Perplexity and token count, one row and one token at a time, each from a pass over the preceding tokens."""
    logs, count = 0.0, 0
    for row in ROWS:
        prompt = TOKENIZER(row.prompt)["input_ids"]
        whole = [*prompt, *TOKENIZER(row.completion)["input_ids"], END]
        mask = torch.zeros(1, len(whole), dtype=torch.long)
        for place in range(len(prompt), len(whole)):
            labels = torch.tensor([[-100] * len(prompt) + whole[len(prompt) : place]])
            given = {"labels": labels} if place > len(prompt) else {}
            with torch.no_grad():
                logits = model(torch.tensor([whole[:place]]), attention_mask=mask[:, :place] + 1, **given).logits
            logs += float(logits[0, -1].double().log_softmax(-1)[whole[place]])
            count += 1
    return math.exp(-logs / count), count


@pytest.mark.parametrize("method", ["none", "milora", "iapt", "bitfit", "ptuning-v2", "adalora"])
def test_it_is_the_products_of_the_tokens_probabilities(method: str) -> None:
    if method == "none":
        model = ARCHITECTURES["llama"]()
    elif method == "milora":
        model = adapted("llama").model
    elif method == "adalora":
        from peft import AdaLoraConfig, get_peft_model

        config = AdaLoraConfig(init_r=4, target_r=2, total_step=100, target_modules=["q_proj"], inference_mode=True)
        # Loaded for inference, when AdaLoRA cannot compute its own loss.
        model = get_peft_model(ARCHITECTURES["llama"](), config).eval()
    else:
        model = adapted_by(method, "llama")
    expected, tokens = by_hand(model)
    model.train()
    found = completion_perplexity(model, TOKENIZER, ROWS, batch_size=2)
    assert model.training
    assert found.perplexity == pytest.approx(expected, rel=1e-4)
    assert found.loss == pytest.approx(math.log(expected), rel=1e-4)
    assert (found.rows, found.tokens, found.no_room) == (3, tokens, 0)


def test_rows_without_room_are_counted_and_left_out() -> None:
    model = ARCHITECTURES["llama"]()
    long = Example("x" * 126, " y", "y")
    assert len(encode_example(TOKENIZER, long)[0]) == 129
    found = completion_perplexity(model, TOKENIZER, [*ROWS, long])
    assert (found.rows, found.no_room) == (3, 1)
    assert found.perplexity == completion_perplexity(model, TOKENIZER, ROWS).perplexity
    with pytest.raises(MiLoraError, match="128 positions"):
        completion_perplexity(model, TOKENIZER, [long])


def test_the_end_of_sequence_belongs_to_the_completion_once() -> None:
    whole, prompt = encode_example(TOKENIZER, Example("ab", "c", "c"))
    assert (TOKENIZER.decode(whole), prompt) == ("abc<eos>", 2)
    assert encode_example(TOKENIZER, Example("ab", "c<eos>", "c")) == (whole, prompt)
    # A tokenizer that appends an end token also appends it to the prompt alone, where it does not count.
    _, prompt = encode_example(character_tokenizer(appends_end=True), Example("ab", "c", "c"))
    assert prompt == 2
