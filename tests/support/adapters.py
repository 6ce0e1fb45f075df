"""Backbones with random MiLoRA adapters, large enough in their effect that no check of them is void."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from milora import MiLoraConfig
from support.architectures import ARCHITECTURES, EXPERTS


def randomize(model: PeftModel, adapter: str = "default", seed: int = 0) -> None:
    """Gives an adapter's tensors values under which routes differ between prompts and outputs from the backbone's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" not in name or f".{adapter}" not in name or "activation" in name:
                continue
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            else:
                scale = 1.0 if "router" in name else 0.25
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def adapted(family: str, seed: int = 0, **settings: Any) -> PeftModel:
    """A tiny backbone of a family with a random MiLoRA adapter `default`, in evaluation mode."""
    values = {"r": 4, "lora_alpha": 8, "top_k": min(2, len(EXPERTS[family])), **settings}
    model = get_peft_model(ARCHITECTURES[family](), MiLoraConfig(**values))
    randomize(model, seed=seed)
    return model.eval()


def contract_tensors(model: PeftModel, adapter: str = "default", *, gradients: bool = False) -> dict[str, Tensor]:
    """An adapter's parameters, or their gradients, by the names that its file has."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name and (f".{adapter}." in name or name.endswith(f".{adapter}")):
            key = name.replace(f".{adapter}", "")
            key = key.removesuffix(".weight") if "magnitude" in key else key
            tensors[key] = parameter.grad if gradients else parameter.detach()
    return tensors
