"""Layers other than plain LoRA: whole modules that PEFT saves, and quantised weights."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.architectures import ARCHITECTURES
from support.tenants import Alone, engine_on, greedy, prompt_of, read, saved_adapters
from support.tokenizer import character_tokenizer

from milora import MiLoraConfig
from milora.backbone.blocks import find_blocks
from milora.serving.engine import Engine, EngineSettings
from milora.serving.requests import AdapterError

SAVED: dict[str, Any] = {
    "head": MiLoraConfig(r=4, top_k=2, modules_to_save=["lm_head"]),
    "embedding": MiLoraConfig(r=4, top_k=2, modules_to_save=["embed_tokens", "lm_head"]),
    "late-embedding": MiLoraConfig(
        r=4, top_k=2, modules_to_save=["embed_tokens"], adapted_tokens="completion", pooler="last"
    ),
    "lora-head": LoraConfig(r=3, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"]),
}


def save(folder: Path, backbone: str, config: Any) -> Path:
    model = get_peft_model(ARCHITECTURES[backbone](), config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def test_modules_that_are_saved_whole_are_each_requests_own(tmp_path: Path) -> None:
    folders = {name: save(tmp_path / name, "llama", config) for name, config in SAVED.items()}
    folders |= saved_adapters(tmp_path, "llama", {"plain": {}})
    torch.set_num_threads(1)
    alone = Alone("llama", folders)
    generator = random.Random(0)
    document = prompt_of(generator, 16)
    with engine_on("llama", folders, step_tokens=12) as engine:
        running = []
        for number in range(4 * (len(folders) + 1)):
            adapter = [None, *folders][number % (len(folders) + 1)]
            prompt = (*document, *prompt_of(generator, generator.randrange(1, 9)))
            running.append((adapter, prompt, engine.submit(greedy(prompt, adapter, 9))))
        for adapter, prompt, generation in running:
            assert read(generation).tokens == [alone(adapter, prompt, 9)], adapter
        # Its embedding also changes the prompt's keys and values, so other adapters cannot share them.
        assert not engine._pool.find("late-embedding").is_shared


def test_single_trained_tokens_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "tokens", "llama", MiLoraConfig(r=4, top_k=2, trainable_token_indices=[3, 5]))
    with engine_on("llama") as engine, pytest.raises(AdapterError, match="trainable_token_indices"):
        engine.load_adapter("tokens", folder)


def test_a_quantised_backbone(tmp_path: Path) -> None:
    core = pytest.importorskip("hqq.core.quantize")
    settings = core.BaseQuantizeConfig(nbits=4, group_size=16)

    def quantised() -> Any:
        model = ARCHITECTURES["llama"]()
        for block in find_blocks(model):
            for path, linear in block.linears.items():
                parent, _, name = path.rpartition(".")
                layer = core.HQQLinear(linear, settings, compute_dtype=torch.float32, device="cpu")
                setattr(block.module.get_submodule(parent), name, layer)
        return model

    folders = saved_adapters(tmp_path, "llama", {"one": {}, "two": {"use_dora": True}})
    alone = {name: PeftModel.from_pretrained(quantised(), folders[name]).eval() for name in ("one", "two")}
    generator = random.Random(0)
    with Engine(quantised(), character_tokenizer(), folders, EngineSettings(cache_bytes=2**22)) as engine:
        running = []
        for number in range(10):
            name, prompt = ("one", "two")[number % 2], prompt_of(generator, generator.randrange(1, 20))
            running.append((name, prompt, engine.submit(greedy(prompt, name, 6))))
        for name, prompt, generation in running:
            text = alone[name].generate(input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
            assert read(generation).tokens == [text[0, len(prompt) :].tolist()], name


def test_a_lora_outside_the_blocks_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "outside", "llama", LoraConfig(r=3, target_modules=["q_proj", "lm_head"]))
    with engine_on("llama") as engine, pytest.raises(AdapterError, match="not a linear module of a block"):
        engine.load_adapter("outside", folder)
