"""Checks for launcher options that accelerate ignores."""

from __future__ import annotations

import os

from accelerate import DistributedType, PartialState
from accelerate.utils import str_to_bool

from milora_core.errors import MiLoraError


def check_launch() -> None:
    """Checks how the processes were started, before a backbone is loaded.

    Accelerate silently ignores FSDP without GPUs and DeepSpeed with `--use_cpu`, and its DeepSpeed processes on CPUs do
    not communicate. With FSDP, transformers reads the launcher's environment itself and would leave the backbone empty
    in all processes but the first.

    Raises:
        MiLoraError: If FSDP or DeepSpeed is requested but not active.
    """
    kind = PartialState().distributed_type
    if _asked("ACCELERATE_USE_FSDP") and kind in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise MiLoraError(
            "The launcher requests FSDP, which accelerate supports only on GPUs and in processes that it started: "
            "launch without it, on CPUs with --multi_gpu --use_cpu (one whole model per process)."
        )
    if _asked("ACCELERATE_USE_DEEPSPEED") and kind in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise MiLoraError(
            "The launcher requests DeepSpeed, which accelerate ignores with --use_cpu: remove --use_cpu from the "
            "launcher and from milora train. Without GPUs, DeepSpeed uses the CPU (DS_ACCELERATOR=cpu)."
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if kind is DistributedType.DEEPSPEED and PartialState().num_processes != started:
        raise MiLoraError(
            f"DeepSpeed was launched in {started} processes, but on CPUs accelerate supports one: pass --num_processes"
            " 1, or launch without DeepSpeed, with --multi_gpu --use_cpu."
        )


def _asked(name: str) -> bool:
    return bool(str_to_bool(os.environ.get(name, "false")))
