"""The settings of a benchmark."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch

from milora.backbone.loading import DTYPES, device_of
from milora_core.errors import MiLoraError

Own = TypeVar("Own", bound="Settings")

CPU_BACKBONE = "tinyllama-1.1b"
GPU_BACKBONE = "llama-2-7b"


@dataclass(frozen=True)
class Settings:
    """The backbone and the settings that all methods share.

    Args:
        backbone: A named shape or a folder with a `config.json`. The weights are random. By default TinyLlama's shape
            on a CPU and Llama-2 7B's on a GPU.
        layers: Number of Transformer blocks; by default the shape's.
        device: The device; by default the GPU if there is one.
        dtype: The backbone's dtype.
        adapter_dtype: The adapters' dtype (routers are always float32): the backbone's, or `float32`, which is PEFT's
            default. `None` means the backbone's for inference and `float32` for training.
        attention: transformers' `attn_implementation`; by default its own choice.
        compile: Decode with a static cache and a compiled forward pass, for every method.
        rounds: Number of measurements of each method, in turn with the others.
        warmups: Number of unmeasured runs of each method before the measurements.
        round_seconds: Maximum time of a run. A slower method generates fewer tokens, at least four; its row has the
            number.
        seed: Seed of the weights and the prompts.

    Raises:
        MiLoraError: If a value is unknown or out of range.
    """

    backbone: str | None = None
    layers: int | None = None
    device: str | None = None
    dtype: str = "bfloat16"
    adapter_dtype: str | None = None
    attention: str | None = None
    compile: bool = False
    rounds: int = 5
    warmups: int = 1
    round_seconds: float = 120.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (self.dtype, self.adapter_dtype):
            if name is not None and not isinstance(DTYPES.get(name), torch.dtype):
                known = [key for key, value in DTYPES.items() if isinstance(value, torch.dtype)]
                raise MiLoraError(f"There is no dtype {name!r}; choose one of {', '.join(known)}.")
        if self.adapter_dtype not in (None, self.dtype, "float32"):
            raise MiLoraError(
                f"Adapters have the backbone's dtype ({self.dtype}) or float32; found {self.adapter_dtype}."
            )
        check_at_least("rounds", self.rounds, 1)
        check_at_least("warmups", self.warmups, 1)
        if self.layers is not None:
            check_at_least("layers", self.layers, 1)
        if not self.round_seconds > 0:
            raise MiLoraError(f"round_seconds must be above 0; found {self.round_seconds}.")

    def resolved(self: Own, *, training: bool = False) -> Own:
        """The settings with machine-dependent defaults filled in.

        Raises:
            MiLoraError: If the device is not available.
        """
        device = device_of(self.device)
        return replace(
            self,
            device=str(device),
            backbone=self.backbone or (CPU_BACKBONE if device.type == "cpu" else GPU_BACKBONE),
            adapter_dtype=self.adapter_dtype or ("float32" if training else self.dtype),
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The backbone's dtype."""
        dtype = DTYPES[self.dtype]
        assert isinstance(dtype, torch.dtype)
        return dtype

    def to_dict(self) -> dict[str, Any]:
        """The settings for the result."""
        return asdict(self)


def check_at_least(name: str, value: int | tuple[int, ...], least: int) -> None:
    """Checks that a number, or each of several, is not below a minimum.

    Raises:
        MiLoraError: If a number is below `least`.
    """
    for number in value if isinstance(value, tuple) else (value,):
        if number < least:
            raise MiLoraError(f"{name} must be at least {least}; found {number}.")
