"""The embedded engine on SmolLM2: texts equal `generate` alone, with long first tokens and similar prompts."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from milora import MiLoraConfig
from milora.serving.engine import Engine, EngineSettings
from milora.serving.requests import GenerationRequest, Sampling

pytestmark = [pytest.mark.real, pytest.mark.slow]

KINDS: dict[str, dict[str, Any]] = {
    "whole": {},
    "window": {"router_window": 24},
    "late": {"adapted_tokens": "completion", "pooler": "last"},
    "dora": {"use_dora": True},
}
NEW = 12
QUESTIONS = (
    "Name three rivers of Europe.",
    "What is the capital of France, and what is it known for?",
    "Write one sentence about a cat that sleeps in the sun.",
    "Add 17 and 25. Explain each step.",
    "Why is the sky blue? Answer for a child, in two sentences, and do not mention any formula.",
)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def adapters(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters large enough to change texts but small enough to keep them readable."""
    folders = {}
    for seed, (name, settings) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        model = get_peft_model(load(smollm2), MiLoraConfig(r=8, **settings))
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(std=0.02)
        folders[name] = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(folders[name])
    return folders


def test_mixed_staggered_requests_equal_generate(smollm2: Path, adapters: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    generator = random.Random(0)
    requests = []
    for number in range(10):
        question = QUESTIONS[(number + number // 5) % len(QUESTIONS)] * generator.randrange(1, 4)
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        requests.append(([None, *adapters][number % (1 + len(adapters))], tuple(prompt)))
    models: dict[str | None, Any] = {None: load(smollm2)}
    models |= {name: PeftModel.from_pretrained(load(smollm2), folder).eval() for name, folder in adapters.items()}
    expected = []
    for adapter, prompt in requests:
        inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.long)}
        output = models[adapter].generate(**inputs, max_new_tokens=NEW, do_sample=False)
        expected.append(output[0, len(prompt) :].tolist())
    settings = EngineSettings(most_texts=6, step_tokens=40, cache_bytes=2**27)
    with Engine(load(smollm2), tokenizer, adapters, settings) as engine:
        running = [engine.submit(GenerationRequest(prompt, Sampling(NEW), adapter)) for adapter, prompt in requests]
        for generation, tokens, (adapter, _) in zip(running, expected, requests, strict=True):
            events = list(generation)
            assert [token for event in events for token in event.tokens] == tokens, adapter
            assert "".join(event.text for event in events) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert len({tuple(tokens) for tokens in expected}) > 5
