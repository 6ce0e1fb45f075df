"""A tiny backbone with a MiLoRA adapter, and a reference with the same tensors."""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from milora import MiLoraConfig
from milora.tuners import context
from milora.tuners.context import entries
from support.architectures import ARCHITECTURES, BLOCKS, EXPERTS, UNEVEN_ARCHITECTURES, UNEVEN_EXPERTS
from support.reference import ReferenceMiLora, random_adapter

ALL_ARCHITECTURES = {**ARCHITECTURES, **UNEVEN_ARCHITECTURES}


class Adapted(NamedTuple):
    """The model under test in eval mode, and its reference on a separate backbone."""

    model: PeftModel
    reference: ReferenceMiLora


@cache
def _backbone(name: str) -> PreTrainedModel:
    # Shared by all references of an architecture, which never change it.
    return ALL_ARCHITECTURES[name]()


def settings_for(name: str, **settings: Any) -> dict[str, Any]:
    """The configuration fields that determine the adapter's tensors, for both `MiLoraConfig` and the reference."""
    experts = UNEVEN_EXPERTS[name] if name in UNEVEN_EXPERTS else EXPERTS[name]
    defaults = {
        "r": 4,
        "lora_alpha": 8,
        "top_k": 2,
        "pooler": "attention",
        "router_activation": "rational",
        "rational_orders": [6, 5],
        "gate": "hard",
        "router_norm": "tokens",
        "use_dora": False,
        "use_rslora": False,
        "experts": experts,
    }
    return {**defaults, **settings}


def tensors_for(name: str, seed: int = 0, **settings: Any) -> dict[str, Tensor]:
    """Random adapter tensors, named as in the adapter's file."""
    return random_adapter(_backbone(name), BLOCKS.get(name, "model.layers"), settings_for(name, **settings), seed)


def fill(model: PeftModel, tensors: dict[str, Tensor], adapter: str = "default") -> None:
    """Loads tensors into an adapter of the model; every tensor must match a parameter."""
    result = set_peft_model_state_dict(model, tensors, adapter)
    assert not result.unexpected_keys


def adapted(name: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> Adapted:
    """A model whose adapter visibly changes what its backbone decodes, and the reference with the same tensors."""
    fields = settings_for(name, **settings)
    tensors = tensors_for(name, seed, **settings)
    # MiLoRA must find `experts` itself.
    config = MiLoraConfig(**{key: value for key, value in fields.items() if key != "experts"})
    model = get_peft_model(ALL_ARCHITECTURES[name]().to(dtype), config)
    fill(model, tensors)
    return Adapted(model.eval(), ReferenceMiLora(_backbone(name), tensors, fields))


def perturbed(model: PeftModel, scale: float) -> PeftModel:
    """The model in eval mode after normal noise of this standard deviation was added to its trainable parameters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    return model.eval()


def add_adapter(model: PeftModel, adapter: str, name: str = "llama", *, seed: int, **settings: Any) -> ReferenceMiLora:
    """Adds another adapter to the model and returns its reference."""
    fields = settings_for(name, **settings)
    tensors = tensors_for(name, seed, **settings)
    model.add_adapter(adapter, MiLoraConfig(**{key: value for key, value in fields.items() if key != "experts"}))
    fill(model, tensors, adapter)
    model.eval()
    return ReferenceMiLora(_backbone(name), tensors, fields)


def saved(folder: Path, name: str = "llama", **settings: Any) -> Path:
    """Saves an adapter with PEFT and returns its folder."""
    adapted(name, **settings).model.save_pretrained(folder)
    return folder


def assert_nothing_in_force(model: PeftModel) -> None:
    """Asserts that no pass, generation or route is still active and nobody uses the adapters."""
    assert entries() in ((), (context._NOTHING_INHERITED,))
    assert not context._open_scopes.get(model.base_model.owner)
    assert not model.base_model.owner.identities.others_running()
    assert model.base_model.hooks.merged is None


class Snapshot:
    """Everything that a refused operation must not change: modules, weights, hooks, trainable parameters, configs."""

    def __init__(self, model: nn.Module) -> None:
        self.state = {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=True).items()}
        self.structure = self._structure(model)

    @staticmethod
    def _structure(model: nn.Module) -> dict[str, Any]:
        return {
            "modules": [(name, type(module)) for name, module in model.named_modules()],
            "hooks": {
                name: (list(module._forward_pre_hooks), list(module._forward_hooks))
                for name, module in model.named_modules()
            },
            "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            "training": model.training,
            "configs": sorted(getattr(model, "peft_config", {})),
            "active": list(getattr(model, "active_adapters", [])) if isinstance(model, PeftModel) else None,
        }

    def assert_unchanged(self, model: nn.Module) -> None:
        assert self._structure(model) == self.structure
        after = model.state_dict()
        assert list(after) == list(self.state)
        for name, tensor in self.state.items():
            assert torch.equal(after[name], tensor), name
