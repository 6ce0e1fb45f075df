"""Plain LoRA adapters beside MiLoRA's on one backbone: a LoRA is a MiLoRA adapter that always chooses every expert."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights

from milora.backbone.blocks import find_blocks
from milora.tuners.adapter_file import check_adapter_file
from milora.tuners.milora.config import MiLoraConfig
from milora.tuners.milora.model import MiLoraModel
from milora_core.errors import MiLoraError

PREFIX = "base_model.model."

NOT_TAKEN_OVER = (
    *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    # The saved weights define the adapted modules, and need no initialisation.
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "eva_config"),
)


def add_lora(model: PeftModel, adapter: str, folder: str | Path) -> None:
    """Adds a saved LoRA adapter to a MiLoRA model, where it can be active or serve some rows of a batch.

    It becomes a MiLoRA adapter with hard gates whose routers choose every module of the LoRA, so its outputs equal the
    LoRA's. The routers still run once per prompt.

    Args:
        model: A PEFT model with MiLoRA adapters.
        adapter: The new adapter's name.
        folder: The folder in which PEFT saved it.

    Raises:
        MiLoraError: If the model is not a MiLoRA model, the folder has no LoRA adapter, or the LoRA has an option or a
            module that MiLoRA does not support.
    """
    if not isinstance(getattr(model, "base_model", None), MiLoraModel):
        raise MiLoraError("add_lora needs a PEFT model with a MiLoRA adapter; a LoRA model loads it with load_adapter.")
    config = PeftConfig.from_pretrained(str(folder))
    if type(config) is not LoraConfig:
        raise MiLoraError(f"{folder} holds a {config.peft_type} adapter; add_lora adds LoRA adapters.")
    check_adapter_file(Path(folder), config.modules_to_save)
    weights = load_peft_weights(str(folder), device="cpu")
    # Others are of modules that the adapter saves whole.
    modules = {key.partition(".lora_")[0].removeprefix(PREFIX) for key in weights if ".lora_" in key}
    experts: dict[str, list[str]] = {}
    for block in find_blocks(model.base_model.model):
        of_block = [name for name in block.linears if f"{block.path}.{name}" in modules]
        if of_block:
            experts[block.path] = of_block
    outside = modules - {f"{path}.{name}" for path, names in experts.items() for name in names}
    if outside:
        raise MiLoraError(f"The LoRA in {folder} adapts {sorted(outside)[0]}, which is not a linear module of a block.")
    values = {
        field.name: getattr(config, field.name)
        for field in fields(LoraConfig)
        if field.init and field.name not in NOT_TAKEN_OVER
    }
    count = max(len(names) for names in experts.values())
    model.add_adapter(adapter, MiLoraConfig(**values, experts=experts, top_k=count, gate="hard", inference_mode=True))
    own = get_peft_model_state_dict(model, adapter_name=adapter)
    if not set(weights) <= set(own):
        model.delete_adapter(adapter)
        unknown = sorted(set(weights) - set(own))[0]
        raise MiLoraError(f"The LoRA in {folder} has {unknown}, which MiLoRA does not support.")
    set_peft_model_state_dict(model, {**own, **weights}, adapter)
    # PEFT creates a new adapter's layers in training mode.
    model.train(model.training)
