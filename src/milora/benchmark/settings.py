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
        backbone: A named shape or a folder with a `config.json`; the weights are random. By default TinyLlama's shape
            on a CPU and Llama-2 7B's on a GPU.
        layers: Number of Transformer blocks instead of the shape's own.
        device: Where it runs; the GPU where there is one by default.
        dtype: The backbone's.
        adapter_dtype: The adapters' (routers are float32 always): the backbone's, or `float32` as PEFT makes them by
            itself. `None` takes the backbone's for inference, and `float32` for training.
        attention: transformers' `attn_implementation`; its own choice by default.
        compile: Decode with a static cache and a compiled forward pass, for every method.
        rounds: How often each method is measured, in turn with the others.
        warmups: Runs of each method before, the speed of which is not measured.
        round_seconds: A method that would take longer for one run generates fewer tokens in it, at least four; its row
            says how many.
        seed: Of the weights and the prompts.

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
        """With the defaults that depend on the machine filled in.

        Raises:
            MiLoraError: If the device is not there.
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
        """For the result."""
        return asdict(self)


def check_at_least(name: str, value: int | tuple[int, ...], least: int) -> None:
    """Refuses a number, or any of several, that is too small.

    Raises:
        MiLoraError: If `value < least`.
    """
    for number in value if isinstance(value, tuple) else (value,):
        if number < least:
            raise MiLoraError(f"{name} must be at least {least}; found {number}.")
