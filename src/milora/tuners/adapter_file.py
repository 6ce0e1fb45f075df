"""What can be said of an adapter's weights before anything is built for them."""

from __future__ import annotations

from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from milora.errors import MiLoraError


def check_adapter_file(folder: Path) -> None:
    """Checks that a folder's adapter weights are a complete safetensors file, by its header.

    Raises:
        MiLoraError: If there is none, only a pickled one (which is never opened), or the file is truncated.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        if (folder / WEIGHTS_NAME).is_file():
            raise MiLoraError(
                f"{folder} holds a pickled {WEIGHTS_NAME}, which can run code when it is opened and is not read. "
                f"Save the adapter again as {SAFETENSORS_WEIGHTS_NAME}."
            )
        raise MiLoraError(f"{folder} has an adapter_config.json but no {SAFETENSORS_WEIGHTS_NAME}.")
    try:
        with safe_open(path, framework="pt"):
            return
    except SafetensorError as error:
        raise MiLoraError(f"{path} is truncated or not a safetensors file: {error}.") from error


def check_adapter_tensors(model: nn.Module, adapter: str, tensors: dict[str, Tensor]) -> None:
    """Checks that a file's tensors are those of the adapter, before any is copied into the model.

    Args:
        model: The model with the adapter's layers in it.
        adapter: The adapter's name.
        tensors: The file's tensors by the model's own parameter names.

    Raises:
        MiLoraError: If tensors are missing, unknown, of another size, or not finite.
    """
    suffix = f".{adapter}"
    expected = {
        name: parameter.shape
        for name, parameter in model.named_parameters()
        if (f"{suffix}." in name or name.endswith(suffix)) and ("lora_" in name)
    }
    given = {name: tensor for name, tensor in tensors.items() if "lora_" in name}
    _refuse(sorted(set(expected) - set(given)), "lacks {} tensors of this adapter")
    _refuse(sorted(set(given) - set(expected)), "has {} tensors that this adapter has no place for")
    sizes = [
        f"{name} is {tuple(tensor.shape)}, the backbone needs {tuple(expected[name])}"
        for name, tensor in given.items()
        if tensor.shape != expected[name]
    ]
    _refuse(sizes, "is for another backbone or rank: {} tensors differ in size")
    _refuse(
        [name for name, tensor in given.items() if not tensor.isfinite().all()], "has NaN or infinity in {} tensors"
    )


def _refuse(names: list[str], complaint: str) -> None:
    if names:
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        raise MiLoraError(f"The adapter's file {complaint.format(len(names))}: {'; '.join(names[:2])}{more}.")
