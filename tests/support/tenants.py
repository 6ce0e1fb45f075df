"""Tiny backbones with adapters of all kinds on disk, and the tokens that `generate` alone produces with each."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from milora.serving.engine import Engine, EngineSettings
from milora.serving.events import TokenEvent
from milora.serving.requests import GenerationRequest, Sampling
from support.adapted import adapted
from support.architectures import ARCHITECTURES, VOCABULARY
from support.tokenizer import character_tokenizer

KINDS: dict[str, dict[str, Any]] = {
    "milora": {},
    "milora-rank": {"r": 6, "top_k": 3, "pooler": "mean", "gate": "softmax"},
    "milora-last": {"pooler": "last", "gate": "renormalized", "use_rslora": True},
    "midora": {"use_dora": True, "pooler": "max"},
    "window": {"router_window": 6},
    "late": {"adapted_tokens": "completion", "pooler": "last"},
    "late-mean": {"adapted_tokens": "completion", "pooler": "mean"},
    "late-window": {"adapted_tokens": "completion", "router_window": 5},
    "late-midora": {"adapted_tokens": "completion", "pooler": "last", "use_dora": True},
}
"""Settings of MiLoRA adapters by name."""


def saved_adapters(folder: Path, backbone: str, kinds: Mapping[str, dict[str, Any]] = KINDS) -> dict[str, Path]:
    """Saves an adapter of each kind and two plain LoRAs; returns their folders."""
    folders = {}
    for seed, (name, settings) in enumerate(kinds.items()):
        # `adapted_tokens` and the window do not affect the tensors.
        own = {key: value for key, value in settings.items() if key not in ("adapted_tokens", "router_window")}
        model = adapted(backbone, seed=seed, **own).model
        config = model.peft_config["default"]
        config.adapted_tokens = settings.get("adapted_tokens", "all")
        config.router_window = settings.get("router_window")
        folders[name] = folder / name
        model.save_pretrained(folders[name])
    for name, settings in {"lora": {"r": 5}, "dora": {"r": 3, "use_dora": True}}.items():
        folders[name] = folder / name
        save_lora(folders[name], backbone, **settings)
    return folders


def save_lora(folder: Path, backbone: str, **settings: Any) -> None:
    """Saves a plain LoRA adapter that visibly changes the backbone's output."""
    model = get_peft_model(
        ARCHITECTURES[backbone](), LoraConfig(target_modules=["q_proj", "up_proj", "down_proj"], **settings)
    )
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)


class Alone:
    """Greedy `generate` with one adapter, on a separate model for each adapter."""

    def __init__(self, backbone: str, folders: Mapping[str, Path], device: str = "cpu") -> None:
        self._device = device
        # Built at once, because building a model draws random numbers, as does an engine thread that loads adapters.
        self._models: dict[str | None, Any] = {None: ARCHITECTURES[backbone]()}
        for name, folder in folders.items():
            self._models[name] = PeftModel.from_pretrained(ARCHITECTURES[backbone](), folder).eval()
        for model in self._models.values():
            model.to(device)

    def __call__(self, adapter: str | None, prompt: tuple[int, ...], new_tokens: int, **options: Any) -> list[int]:
        return self.all(adapter, prompt, new_tokens, **options)[0]

    def all(self, adapter: str | None, prompt: tuple[int, ...], new_tokens: int, **options: Any) -> list[list[int]]:
        with torch.no_grad():
            output = self._models[adapter].generate(
                input_ids=torch.tensor([prompt], device=self._device),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=self._device),
                max_new_tokens=new_tokens,
                do_sample=False,
                **options,
            )
        return output[:, len(prompt) :].tolist()

    def model(self, adapter: str | None) -> Any:
        return self._models[adapter]


@dataclass
class Answer:
    """A request's texts, assembled from its events."""

    tokens: list[list[int]]
    texts: list[str]
    events: list[TokenEvent]

    @property
    def reasons(self) -> list[tuple[str | None, int | str | None]]:
        last = {event.index: (event.finish_reason, event.stop_reason) for event in self.events}
        return [last[index] for index in sorted(last)]


def read(generation: Any) -> Answer:
    """Reads a generation to its end."""
    events = list(generation)
    count = max((event.index for event in events), default=-1) + 1
    of_text = [[event for event in events if event.index == index] for index in range(count)]
    return Answer(
        [[token for event in own for token in event.tokens] for own in of_text],
        ["".join(event.text for event in own) for own in of_text],
        events,
    )


def prompt_of(generator: random.Random, tokens: int) -> tuple[int, ...]:
    return tuple(generator.randrange(1, VOCABULARY - 1) for _ in range(tokens))


def engine_on(backbone: str, folders: Mapping[str, Path] | None = None, device: str = "cpu", **settings: Any) -> Engine:
    settings = {"cache_bytes": 2**22, "page_tokens": 4, **settings}
    return Engine(
        ARCHITECTURES[backbone]().to(device), character_tokenizer(), folders or {}, EngineSettings(**settings)
    )


def greedy(prompt: tuple[int, ...], adapter: str | None, tokens: int, **more: Any) -> GenerationRequest:
    fields = {name: more.pop(name) for name in ("tenant", "route", "return_route", "deadline") if name in more}
    return GenerationRequest(prompt, Sampling(tokens, ignore_eos=True, **more), adapter, **fields)
