"""Exports one route of a MiLoRA adapter as a plain PEFT LoRA adapter, for engines without routers."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor

from milora.tuners.milora.config import MiLoraConfig
from milora.tuners.milora.router import chosen_modules
from milora_core.errors import MiLoraError
from milora_core.files import require_vacant, whole_folder
from milora_core.routing import Route

PREFIX = "base_model.model."
"""What the names of a PEFT file start with."""


def export_route(
    model: Any, route: Route, folder: str | Path, adapter: str | None = None, *, tokenizer: Any = None
) -> LoraConfig:
    """Writes the LoRA adapter that equals a MiLoRA adapter under one route, frozen for every prompt.

    It contains only the modules that the route chose. A gate g scales the module's `lora_B`: the LoRA term
    `g * scaling * B A x` is linear in B. MiDoRA with gates of 1 becomes DoRA.

    Args:
        model: The `PeftModel` with the MiLoRA adapter.
        route: A route of one row.
        folder: Where to write; must not exist or must be empty. Written completely or not at all.
        adapter: The adapter's name in the model, by default the active one.
        tokenizer: Saved with the adapter, because its chat template and end of sequence belong to it.

    Returns:
        The configuration that was written.

    Raises:
        MiLoraError: If the adapter is not MiLoRA's, the route is not its or has not exactly one row, nothing is
            chosen, a MiDoRA gate is not 1, or the folder is in use or cannot be written.
    """
    adapter = adapter if adapter is not None else model.active_adapter
    config = model.peft_config.get(adapter)
    if not isinstance(config, MiLoraConfig):
        found = "there is none of that name" if config is None else f"it is {config.peft_type.value}"
        raise MiLoraError(f"Only a MiLoRA adapter has routes to export; for the adapter {adapter!r}, {found}.")
    if len(route) != 1:
        raise MiLoraError(
            f"One route becomes one LoRA adapter; found a route for {len(route)} prompts: select a row, such as "
            "route[0]."
        )
    gates = chosen_modules(model, route, adapter)
    if not gates:
        raise MiLoraError("The route chooses no expert in any block, so there is nothing to export.")
    if config.use_dora and any(gate != 1 for gate in gates.values()):
        raise MiLoraError(
            f"Export supports MiDoRA only with gates of 1, but this adapter has gate={config.gate!r}. Train with "
            "gate='hard' to export."
        )
    tensors = _tensors(get_peft_model_state_dict(model, adapter_name=adapter), gates)
    exported = _config(config, list(gates), model)
    require_vacant(Path(folder))
    with whole_folder(Path(folder)) as partial:
        save_file(tensors, partial / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        exported.save_pretrained(str(partial))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))
    return exported


def _tensors(saved: dict[str, Tensor], gates: dict[str, float]) -> dict[str, Tensor]:
    """The chosen experts' tensors with the gates multiplied in, and other saved tensors except the routers'."""
    tensors = {}
    for key, tensor in saved.items():
        if ".milora_router." in key:
            continue
        module, is_lora, part = key.removeprefix(PREFIX).partition(".lora_")
        if is_lora and module not in gates:
            continue
        gate = gates[module] if part.startswith("B.") else 1.0
        # In float32 and rounded once; cloned, because tensors in a file must not share memory.
        tensors[key] = (tensor.float() * gate).to(tensor.dtype) if gate != 1 else tensor.detach().clone()
    return {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}


def _config(config: MiLoraConfig, modules: list[str], model: Any) -> LoraConfig:
    """LoRA's part of the configuration, for exactly these modules."""
    values = {field.name: getattr(config, field.name) for field in fields(LoraConfig) if field.init}
    for name in ("rank_pattern", "alpha_pattern"):
        # PEFT takes the first pattern that matches, and warns about those that match nothing.
        used = {get_pattern_key(values[name], module) for module in modules}
        values[name] = {pattern: number for pattern, number in values[name].items() if pattern in used}
    values |= {
        "target_modules": modules,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        # The initialisation has no meaning for weights that are read from a file.
        "init_lora_weights": True,
        "eva_config": None,
        "inference_mode": True,
    }
    exported = LoraConfig(**values)
    exported.target_modules = modules  # LoraConfig makes a set of it, whose order in the file would vary
    # PEFT matches a full path also as the ending of a longer one.
    matched = {name for name, _ in model.base_model.model.named_modules() if check_target_module_exists(exported, name)}
    if matched != set(modules):
        raise MiLoraError(f"PEFT would also put LoRA on {sorted(matched - set(modules))[:2]}, which the route lacks.")
    return exported
