"""`milora serve` with a real language model and the openai client: texts equal `generate` alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft import get_peft_model
from support.serving import ServerProcess, write_keys
from transformers import AutoModelForCausalLM, AutoTokenizer

from milora import MiLoraConfig
from milora.inference.generation import encode_prompt

pytestmark = [pytest.mark.real, pytest.mark.slow]

KINDS: dict[str, dict[str, Any]] = {
    "ada": {"adapted_tokens": "completion", "pooler": "last"},
    "bo": {"router_norm": "centered"},
    "cy": {"router_window": 8, "use_dora": True},
}
QUESTIONS = [
    "Which animal lays eggs, a hen or a cow?",
    "What is 12 minus 5?",
]
NEW = 8


@pytest.fixture(scope="module")
def alone(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str, bool], str]]:
    """Adapters of each kind on disk, and the texts of `generate` by (adapter, question, whether it is a chat)."""
    folder = tmp_path_factory.mktemp("real-adapters")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = {}
    for seed, (name, settings) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        backbone = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
        model = get_peft_model(backbone, MiLoraConfig(r=8, top_k=2, **settings)).eval()
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data.normal_(std=0.02)
        model.save_pretrained(folder / name)
        for question in QUESTIONS:
            for chat in (False, True):
                prompt: Any = [{"role": "user", "content": question}] if chat else question
                ids = torch.tensor([encode_prompt(tokenizer, prompt)])
                output = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
                )
                text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
                texts[name, question, chat] = text
    return folder, texts


def test_texts_are_those_of_generate(
    smollm2: Path, alone: tuple[Path, dict[tuple[str, str, bool], str]], tmp_path: Path
) -> None:
    folder, expected = alone
    keys = write_keys(tmp_path, {name: {"adapters": [name]} for name in KINDS})

    async def one(url: str, name: str, question: str, chat: bool, number: int) -> str:
        await asyncio.sleep(0.2 * number)
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=f"{name}-key", max_retries=0) as client:
            common: dict[str, Any] = {"model": name, "max_tokens": NEW, "temperature": 0, "stream": number % 2 == 0}
            if chat:
                messages: Any = [{"role": "user", "content": question}]
                answer: Any = await client.chat.completions.create(messages=messages, **common)
                if common["stream"]:
                    return "".join([chunk.choices[0].delta.content async for chunk in answer])
                return str(answer.choices[0].message.content)
            answer = await client.completions.create(prompt=question, **common)
            if common["stream"]:
                return "".join([chunk.choices[0].text async for chunk in answer])
            return str(answer.choices[0].text)

    async def everything(url: str) -> list[str]:
        return await asyncio.gather(*(one(url, *key, number) for number, key in enumerate(expected)))

    with ServerProcess("--backbone", smollm2, "--adapters", folder, "--dtype", "float32", *keys) as server:
        texts = asyncio.run(everything(server.url))
        assert server.end() == 0
    assert texts == list(expected.values())
