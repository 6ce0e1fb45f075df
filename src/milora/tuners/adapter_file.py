"""Checks an adapter's weights before its layers are built."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from milora_core.errors import MiLoraError

CLASSIFIER_HEADS = ("classifier", "score")
"""PEFT adds both names to the `modules_to_save` of every classifier, which has one of these modules."""


class CheckedFileConfig(PeftConfig):  # type: ignore[misc]
    """A configuration whose adapter file is checked before its layers are built."""

    modules_to_save: list[str] | None
    awaits_weights = False
    """Whether the configuration was read from a folder whose weights are not loaded yet. It is no field, so it is not
    saved."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Like PEFT's method, but also checks the weights of a local adapter.

        Raises:
            MiLoraError: If the weights are missing, truncated or not safetensors.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        folder = Path(os.path.join(pretrained_model_name_or_path, subfolder or ""))
        if isinstance(config, cls) and folder.is_dir():
            check_adapter_file(folder, config.modules_to_save)
        config.awaits_weights = True
        return config


def check_adapter_file(folder: Path, modules_to_save: Iterable[str] | None = None) -> None:
    """Checks by the header that a folder's adapter weights are a complete safetensors file.

    Args:
        folder: The adapter's folder.
        modules_to_save: Name endings of further modules that the file must contain.

    Raises:
        MiLoraError: If the file is missing, pickled (it is never opened) or truncated, or lacks a module.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        if (folder / WEIGHTS_NAME).is_file():
            raise MiLoraError(
                f"{folder} contains a pickled {WEIGHTS_NAME}, which could run code and is not opened. "
                f"Save the adapter again as {SAFETENSORS_WEIGHTS_NAME}."
            )
        raise MiLoraError(f"{folder} has an adapter_config.json but no {SAFETENSORS_WEIGHTS_NAME}.")
    try:
        with safe_open(path, framework="pt") as file:
            names = [f".{name}" for name in file.keys()]  # noqa: SIM118 (it is no mapping)
    except SafetensorError as error:
        raise MiLoraError(f"{path} is truncated or not a safetensors file: {error}.") from error
    wanted = [(module,) for module in modules_to_save or () if module not in CLASSIFIER_HEADS]
    heads = tuple(module for module in modules_to_save or () if module in CLASSIFIER_HEADS)
    for alternatives in [*wanted, heads] if heads else wanted:
        if not any(f".{module}." in name for module in alternatives for name in names):
            missing = " or ".join(map(repr, alternatives))
            raise MiLoraError(f"{path} has no tensors of {missing}, which its adapter_config.json says it saves.")


def check_adapter_tensors(model: nn.Module, adapter: str, tensors: dict[str, Tensor]) -> None:
    """Checks that a file's tensors match the adapter before any is copied into the model.

    Args:
        model: The model with the adapter's layers.
        adapter: The adapter's name.
        tensors: The file's tensors by the model's parameter names.

    Raises:
        MiLoraError: If tensors are missing or unknown, have another size, or are not finite.
    """
    expected = dict(_adapter_parameters(model, adapter))
    places = model.state_dict(keep_vars=True)
    _refuse(sorted(set(expected) - set(tensors)), "lacks {} tensors of this adapter")
    _refuse(sorted(set(tensors) - set(places)), "has {} tensors that this adapter does not have")
    sizes = [
        f"{name} is {tuple(tensor.shape)}, the backbone needs {tuple(places[name].shape)}"
        for name, tensor in tensors.items()
        if tensor.shape != places[name].shape
    ]
    _refuse(sizes, "is for another backbone or rank: {} tensors differ in size")
    _refuse(
        [name for name, tensor in tensors.items() if not tensor.isfinite().all()], "has NaN or infinity in {} tensors"
    )


def _adapter_parameters(model: nn.Module, adapter: str) -> Iterator[tuple[str, Tensor]]:
    # Follows PEFT's layout, not the names: an adapter may be named "model" or "lora_A".
    for path, layer in model.named_modules():
        # A tied head's trainable tokens are the embedding's, and PEFT saves them once.
        if not isinstance(layer, BaseTunerLayer) or getattr(layer, "tied_adapter", None) is not None:
            continue
        for attribute in layer.adapter_layer_names:
            part = getattr(layer, attribute)
            if adapter not in part:
                continue
            name = f"{path}.{attribute}.{adapter}"
            if isinstance(part[adapter], Tensor):
                yield name, part[adapter]
            else:
                yield from part[adapter].named_parameters(name)
                yield from part[adapter].named_buffers(name)


def _refuse(names: list[str], complaint: str) -> None:
    if names:
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        raise MiLoraError(f"The adapter's file {complaint.format(len(names))}: {'; '.join(names[:2])}{more}.")
