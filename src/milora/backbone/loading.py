"""Loads a backbone with its tokenizer and adapters; errors are one line."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from milora.backbone.adapter_tokenizer import adapter_tokenizer, add_end, only_tokenizer
from milora.backbone.bundled import TINY_BACKBONE
from milora.backbone.vocabulary import fit_embeddings, padding_within
from milora.plugins import METHOD_GROUP, plugins
from milora_core.errors import MiLoraError, did_you_mean

TINY = "tiny"
"""The name of the bundled backbone."""

DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)
"""Exceptions of transformers and PEFT for files that are missing, broken or of another kind."""


def load_backbone(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
    **model_arguments: Any,
) -> tuple[Any, Any]:
    """A causal language model in eval mode, and its tokenizer: left padding, with a padding token where possible.

    Args:
        name_or_path: `tiny` (the bundled backbone), a folder, or a hub id.
        dtype: `auto` keeps the dtype in which the model was saved.
        device: By default a GPU if there is one.
        revision: Branch, tag or commit of model and tokenizer on the hub; not for folders.
        **model_arguments: For `AutoModelForCausalLM.from_pretrained`.

    Returns:
        The model and the tokenizer.

    Raises:
        MiLoraError: If there is no such backbone, it cannot be read, or the dtype or the device is unknown.
    """
    source = locate(os.fspath(name_or_path))
    torch_dtype = _dtype(dtype)
    target = device_of(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except _UNREADABLE as error:
        raise MiLoraError(
            f"The tokenizer of {name_or_path} cannot be loaded: {_reason(error)}.{_hub_hint(source)}"
        ) from error
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch_dtype, revision=revision, **model_arguments)
    except _UNREADABLE as error:
        raise MiLoraError(
            f"The backbone {name_or_path} cannot be loaded: {_reason(error)}.{_hub_hint(source)}"
        ) from error
    _prepare(tokenizer, model)
    if "quantization_config" not in model_arguments:
        # A quantised model cannot be moved to another device.
        model = model.to(target)
    return model.eval(), tokenizer


def load_adapter(model: Any, path: str | os.PathLike[str], name: str = "default") -> Any:
    """Loads an adapter onto a backbone, or another one onto a model with adapters; the active adapter does not change.

    Args:
        model: A model that [`load_backbone`] or this function returned.
        path: The adapter's folder or hub id, of any method of PEFT or milora.
        name: The adapter's name in the model.

    Returns:
        The `PeftModel`, in eval mode.

    Raises:
        MiLoraError: If there is no adapter, it cannot be read, it is for another backbone, or the name is in use.
    """
    path = os.fspath(path)
    read_adapter_config(path)
    if name in getattr(model, "peft_config", {}):
        # PEFT would load the new weights into the old adapter, with its settings.
        raise MiLoraError(
            f"The model already has an adapter {name!r}: give {path} another name, or call "
            f"model.delete_adapter({name!r}) first."
        )
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(path, adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, path, adapter_name=name)
    except MiLoraError:
        raise
    except _UNREADABLE as error:
        raise MiLoraError(f"The adapter {path} cannot be loaded onto this backbone: {_reason(error)}.") from error
    return model.eval()


def load_for_inference(
    adapters: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    backbone: str | os.PathLike[str] | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
) -> tuple[Any, Any]:
    """A backbone with adapters, and the tokenizer to generate with. It uses the revision of the adapter's backbone, the
    tokenizer saved with the adapter (chat template, added tokens, end of sequence), and embeddings that were resized.

    Args:
        adapters: An adapter's folder or hub id, or several by name, the first of which is active; an empty mapping
            gives the bare backbone.
        backbone: The backbone for them; by default the one that the adapters name.
        dtype: See [`load_backbone`].
        device: See [`load_backbone`].

    Raises:
        MiLoraError: If a part cannot be loaded, the adapters name different backbones or none, or they have different
            tokenizers.
    """
    named = adapters if isinstance(adapters, Mapping) else {"default": adapters}
    # All adapters are checked first: a backbone can take minutes to load.
    base = backbone_of(named, backbone)
    revision = revision_of(named, base)
    own = {name: adapter_tokenizer(path) for name, path in named.items()}
    model, tokenizer = load_backbone(base, dtype=dtype, device=device, revision=revision)
    if named:
        tokenizer = only_tokenizer({name: each or tokenizer for name, each in own.items()})
        fit_embeddings(model, named)
        _prepare(tokenizer, model)
    for name, path in named.items():
        model = load_adapter(model, path, name)
    return model, tokenizer


def backbone_of(adapters: Mapping[str, str | os.PathLike[str]], backbone: str | os.PathLike[str] | None = None) -> str:
    """The backbone for adapters: the given one, or the one that they name.

    Raises:
        MiLoraError: If there is no such adapter, or the adapters name different backbones or none.
    """
    bases = {os.fspath(path): base_of(path) for path in adapters.values()}
    return _only_base(bases) if backbone is None else os.fspath(backbone)


def revision_of(adapters: Mapping[str, str | os.PathLike[str]], backbone: str) -> str | None:
    """The revision of a backbone that adapters were trained on; `None` for the hub's default revision and for a folder.

    Args:
        adapters: Folders or hub ids by name.
        backbone: The backbone to load; nothing is known if it is not the adapter's own.

    Raises:
        MiLoraError: If the adapters were trained on different revisions.
    """
    if Path(locate(backbone)).is_dir():
        return None
    found = {name: read_adapter_config(path).revision for name, path in adapters.items() if base_of(path) == backbone}
    if len(set(found.values())) > 1:
        revisions = ", ".join(f"{name}: {revision or 'the default'}" for name, revision in found.items())
        raise MiLoraError(
            f"The adapters are for different revisions of {backbone} ({revisions}): load them separately."
        )
    return next(iter(found.values()), None)


def read_adapter_config(path: str | os.PathLike[str]) -> Any:
    """The PEFT configuration of an adapter.

    Raises:
        MiLoraError: If there is no adapter at `path`, or its configuration cannot be read.
    """
    path = os.fspath(path)
    folder = Path(path).expanduser()
    if not (folder / CONFIG_NAME).is_file():
        if (folder / "config.json").is_file():
            raise MiLoraError(f"{path} is a backbone, not an adapter: it has a config.json but no {CONFIG_NAME}.")
        if folder.is_dir():
            inner = sorted(str(file.parent) for file in folder.glob(f"*/{CONFIG_NAME}"))
            hint = f"; there is one in {inner[-1]}" if inner else ""
            raise MiLoraError(f"{path} contains no adapter: it has no {CONFIG_NAME}{hint}.")
        if not _could_be_hub_id(path) or "/" not in path:
            raise MiLoraError(
                f"{path}: there is no such adapter; give a folder with an {CONFIG_NAME}, or a hub id, owner/name"
                f"{_neighbours(folder)}"
            )
    # Another distribution's method may have made the adapter; loading it makes the method known to PEFT.
    plugins(METHOD_GROUP)
    try:
        return PeftConfig.from_pretrained(str(folder) if folder.is_dir() else path)
    except MiLoraError:
        raise
    except _UNREADABLE as error:
        raise MiLoraError(f"The adapter {path} cannot be read: {_reason(error)}.{_hub_hint(path)}") from error


def base_of(adapter: str | os.PathLike[str]) -> str | None:
    """The backbone that an adapter's configuration names.

    Raises:
        MiLoraError: If there is no such adapter.
    """
    base = read_adapter_config(adapter).base_model_name_or_path
    if base is None:
        return None
    # An adapter of the bundled backbone names the folder of the installation that trained it.
    is_bundled = Path(base).parts[-3:] == TINY_BACKBONE.parts[-3:]
    return TINY if is_bundled else str(base)


def _only_base(bases: Mapping[str, str | None]) -> str:
    if not bases:
        raise MiLoraError("No backbone or adapter given: pass --backbone NAME or --adapter DIR.")
    found = {base for base in bases.values() if base is not None}
    if not found:
        raise MiLoraError(f"The adapter {next(iter(bases))} does not name its backbone: pass --backbone NAME.")
    if len(found) > 1:
        raise MiLoraError(
            f"The adapters are for different backbones ({', '.join(sorted(found))}), but one model has one backbone: "
            "load them separately, or choose one with --backbone."
        )
    return found.pop()


def locate(name: str) -> str:
    """The argument of `from_pretrained` for a backbone: a folder (also for the bundled one) or a hub id.

    Raises:
        MiLoraError: If there is no such backbone.
    """
    if name == TINY:
        if not (TINY_BACKBONE / "config.json").is_file():
            raise MiLoraError(f"The bundled backbone is missing from this installation ({TINY_BACKBONE}): reinstall.")
        return str(TINY_BACKBONE)
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return str(path)
    if (path / CONFIG_NAME).is_file():
        raise MiLoraError(f"{name} is an adapter, not a backbone: pass it as --adapter.")
    if path.is_dir():
        raise MiLoraError(f"{name} contains no backbone: it has no config.json.")
    if path.exists() or not _could_be_hub_id(name):
        raise MiLoraError(
            f"{name}: there is no such backbone; give {TINY!r}, a folder with a config.json, or a hub id"
            f"{_neighbours(path)}"
        )
    return name


def _prepare(tokenizer: Any, model: Any) -> None:
    """Makes a tokenizer pad on the left with a token of the model, and its end of sequence end the model's texts."""
    padding_within(model, tokenizer)
    tokenizer.padding_side = "left"
    add_end(model, tokenizer)


def _could_be_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None


def _neighbours(path: Path) -> str:
    """The end of a message about a path that does not exist."""
    if not path.parent.is_dir():
        return f" (there is no folder {path.parent} either)."
    return did_you_mean(path.name, [entry.name for entry in path.parent.iterdir() if entry.is_dir()]) or "."


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise MiLoraError(f"There is no dtype {dtype!r}; choose one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def device_of(device: str | torch.device | None) -> torch.device:
    """A device by its name; by default a GPU if there is one.

    Raises:
        MiLoraError: If there is none of that name.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise MiLoraError(f"There is no device {device!r}; give cpu, cuda or cuda:1.") from error
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise MiLoraError(f"There is no device {device!r} here: torch sees {torch.cuda.device_count()} CUDA devices.")
    return target


def _reason(error: BaseException) -> str:
    """The first sentence of a library's message; the rest is advice about its own functions."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text.rstrip(".: ")


def _hub_hint(source: str) -> str:
    path = Path(source).expanduser()
    if path.is_dir():
        return ""
    hint = " Check the hub id and the connection to the hub; offline, use a folder or a cached model"
    return f"{hint}{_neighbours(path)}"
