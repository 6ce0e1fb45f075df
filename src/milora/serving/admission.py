"""Checks adapter folders before they are loaded: below one root, safetensors only, shapes that fit the backbone.

The checks use names, sizes and the file's header, and read no tensor. An accepted adapter cannot change the backbone or
another tenant's adapter: tensors that PEFT would load into the backbone itself are rejected.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from milora.backbone.loading import read_adapter_config
from milora.backbone.vocabulary import PREFIX
from milora.serving.requests import AdapterError
from milora.tuners.milora.config import WEIGHT_CHANGING_INITIALISATIONS
from milora_core.errors import MiLoraError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
KINDS = ("MILORA", "LORA")
DTYPES = ("F32", "F16", "BF16")
MOST_CONFIG_BYTES = 2**20
MOST_HEADER_BYTES = 16 * 2**20
MOST_RATIONAL_COEFFICIENTS = 64

_LORA = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?"
)
_ROUTER = re.compile(r"(?P<block>.+)\.milora_router\.(?P<part>.+)")
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")


@dataclass(frozen=True)
class AdmissionLimits:
    """Limits on an adapter's size.

    Args:
        rank: Maximum LoRA rank.
        bytes: Maximum size of the weights file.
    """

    rank: int = 256
    bytes: int = 4 * 2**30


class Admission:
    """Checks adapters against one backbone.

    Args:
        model: The backbone.
        root: The root folder of all adapters; `None` if no adapters may be loaded.
        limits: Limits on an adapter's size.
    """

    def __init__(self, model: nn.Module, root: Path | None, limits: AdmissionLimits | None = None) -> None:
        self.root = None if root is None else Path(os.path.realpath(root))
        self.limits = limits or AdmissionLimits()
        self._linear = dict(_linear_shapes(model))
        self._parameters = {name: tuple(each.shape) for name, each in model.named_parameters(remove_duplicate=False)}
        self._embeddings = {
            name: (module.num_embeddings, module.embedding_dim)
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding)
        }
        self._hidden = max(size for _, size in self._embeddings.values()) if self._embeddings else None

    def folder(self, path: str) -> Path:
        """The resolved folder of a path in a request.

        Args:
            path: A path below the root, absolute or relative to the root.

        Raises:
            AdapterError: If the path, with links resolved, is not below the root or not a folder. Both give the same
                error, so a request learns nothing about other folders.
        """
        if self.root is None:
            raise AdapterError("This server has no folder of adapters: start it with --adapters DIR.")
        try:
            found = Path(os.path.realpath(self.root / path))
            is_inside = found != self.root and found.is_relative_to(self.root) and found.is_dir()
        except (OSError, ValueError):  # too long, or with a null character
            is_inside = False
        if not is_inside:
            raise AdapterError("lora_path must be an adapter's folder below the server's folder of adapters.")
        return found

    def check(self, name: str, folder: Path) -> None:
        """Checks an adapter's name and files.

        Args:
            name: The adapter's name.
            folder: The folder that [`folder`] returned.

        Raises:
            AdapterError: If the adapter may not be loaded.
        """
        if NAME.fullmatch(name) is None:
            raise AdapterError(
                "An adapter's name has 1 to 128 letters, digits, and ._- (not at the beginning); found another."
            )
        self._check_links(folder)
        config = self._config(folder)
        shapes = self._header(folder / SAFETENSORS_WEIGHTS_NAME)
        for key, shape in shapes.items():
            self._check_tensor(key, shape, config)
        try:
            read_adapter_config(folder)
        except MiLoraError as error:
            raise AdapterError(str(error)) from error

    def _check_links(self, folder: Path) -> None:
        assert self.root is not None
        for path in folder.iterdir():
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(self.root):
                raise AdapterError(f"{path.name} is a link that leaves the folder of adapters: copy the file.")

    def _config(self, folder: Path) -> dict[str, Any]:
        path = folder / CONFIG_NAME
        if not path.is_file():
            raise AdapterError(f"The folder has no {CONFIG_NAME}: it is not a PEFT adapter.")
        if path.stat().st_size > MOST_CONFIG_BYTES:
            raise AdapterError(f"{CONFIG_NAME} is larger than {MOST_CONFIG_BYTES} bytes.")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"{CONFIG_NAME} is not JSON.") from error
        if not isinstance(config, dict):
            raise AdapterError(f"{CONFIG_NAME} is not a JSON object.")
        if config.get("peft_type") not in KINDS:
            raise AdapterError(
                f"Adapters of type {' and '.join(KINDS)} are served; {CONFIG_NAME} has {config.get('peft_type')!r}."
            )
        if config.get("bias", "none") != "none":
            raise AdapterError("bias must be 'none': the biases would be loaded into the backbone, for all tenants.")
        initialisation = config.get("init_lora_weights")
        if isinstance(initialisation, str) and initialisation.lower().startswith(WEIGHT_CHANGING_INITIALISATIONS):
            raise AdapterError(
                f"init_lora_weights={initialisation!r} changes the backbone, which all tenants share: convert the "
                "adapter to a plain LoRA first (PEFT's path_initial_model_for_weight_conversion)."
            )
        rank = config.get("r")
        patterns = config.get("rank_pattern") or {}
        ranks = [rank, *(patterns.values() if isinstance(patterns, dict) else [patterns])]
        if any(not isinstance(each, int) or not 1 <= each <= self.limits.rank for each in ranks):
            raise AdapterError(f"Ranks must be whole numbers from 1 to {self.limits.rank} (--max-lora-rank).")
        return config

    def _header(self, path: Path) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, by its key without PEFT's prefix."""
        if not path.is_file():
            pickled = f" {WEIGHTS_NAME} is pickled, and never read." if (path.parent / WEIGHTS_NAME).exists() else ""
            raise AdapterError(f"The folder has no {SAFETENSORS_WEIGHTS_NAME}.{pickled}")
        size = path.stat().st_size
        if size > self.limits.bytes:
            raise AdapterError(f"{path.name} has {size} bytes; at most {self.limits.bytes} are allowed.")
        with path.open("rb") as file:
            start = file.read(8)
        if len(start) < 8 or struct.unpack("<Q", start)[0] > min(MOST_HEADER_BYTES, size):
            raise AdapterError(f"{path.name} is not a safetensors file, or its header is too large.")
        shapes = {}
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (it is no mapping)
                    tensor = file.get_slice(key)
                    if tensor.get_dtype() not in DTYPES:
                        raise AdapterError(
                            f"{key} is of type {tensor.get_dtype()}; tensors must be {', '.join(DTYPES)}."
                        )
                    if not key.startswith(PREFIX):
                        raise AdapterError(f"{key} does not begin with {PREFIX}: PEFT did not write this file.")
                    shapes[key.removeprefix(PREFIX)] = tuple(tensor.get_shape())
        except SafetensorError as error:
            raise AdapterError(f"{path.name} is truncated or not a safetensors file.") from error
        return shapes

    def _check_tensor(self, key: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> None:
        saved = config.get("modules_to_save") or []
        if isinstance(saved, list) and _is_in_module(key, saved):
            self._expect(key, shape, self._parameters.get(key))
        elif found := _ROUTER.fullmatch(key):
            self._check_router(key, found["part"], shape)
        elif (found := _TOKENS.fullmatch(key)) and config.get("trainable_token_indices"):
            rows, hidden = self._embeddings.get(found["module"], (0, 0))
            if len(shape) != 2 or shape[1] != hidden or shape[0] > rows:
                raise AdapterError(f"{key} is {shape}; the backbone's embeddings are {(rows, hidden)}.")
        elif found := _LORA.fullmatch(key):
            self._check_lora(key, found["module"], found["part"], shape)
        else:
            raise AdapterError(
                f"{key} is no part of a LoRA, a router or modules_to_save: it would be loaded into the backbone, for "
                "all tenants. Save the adapter without embeddings (save_embedding_layers=False)."
            )

    def _check_lora(self, key: str, module: str, part: str, shape: tuple[int, ...]) -> None:
        size = self._embeddings.get(module) if part.startswith("lora_embedding") else self._linear.get(module)
        if size is None:
            raise AdapterError(f"{key} is for a module that the backbone does not have.")
        # An embedding's A is (rank, tokens) and its B (hidden, rank); a linear module's size is (d_out, d_in).
        d_in, d_out = size if part.startswith("lora_embedding") else (size[1], size[0])
        if part == "lora_magnitude_vector":
            self._expect(key, shape, (d_out,))
            return
        is_a = part.endswith("A")
        rank = shape[0 if is_a else -1] if len(shape) == 2 else 0
        if not 1 <= rank <= self.limits.rank:
            raise AdapterError(f"{key} is {shape}; its rank must be from 1 to {self.limits.rank} (--max-lora-rank).")
        self._expect(key, shape, (rank, d_in) if is_a else (d_out, rank))

    def _check_router(self, key: str, part: str, shape: tuple[int, ...]) -> None:
        if part == "projection.weight":
            is_right = len(shape) == 2 and 1 <= shape[0] <= len(self._linear) and shape[1] == self._hidden
        elif part.startswith("pooler."):
            is_right = shape in ((1, self._hidden), (self._hidden,))
        else:
            is_right = len(shape) <= 1 and all(length <= MOST_RATIONAL_COEFFICIENTS for length in shape)
        if not is_right:
            raise AdapterError(f"{key} is {shape}, which no router of this backbone has (hidden size {self._hidden}).")

    @staticmethod
    def _expect(key: str, shape: tuple[int, ...], expected: tuple[int, ...] | None) -> None:
        if expected is None:
            raise AdapterError(f"{key} is for a module that the backbone does not have.")
        if shape != expected:
            raise AdapterError(f"{key} is {shape}; the backbone needs {expected}.")


def adapters_below(root: Path) -> dict[str, Path]:
    """The adapters directly below a folder, by folder name, sorted."""
    return {path.name: path for path in sorted(root.iterdir()) if (path / CONFIG_NAME).is_file()}


def _is_in_module(key: str, names: Sequence[str]) -> bool:
    return any(f".{name}." in f".{key}" for name in names)


def _linear_shapes(model: nn.Module) -> Iterable[tuple[str, tuple[int, int]]]:
    """Each linear module's (d_out, d_in), quantised or not."""
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            yield name, (int(module.nf), int(module.nx))
        elif hasattr(module, "in_features") and hasattr(module, "out_features"):
            yield name, (int(module.out_features), int(module.in_features))
