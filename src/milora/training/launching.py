"""What the launcher asks for and accelerate leaves out."""

from __future__ import annotations

import os

from accelerate import DistributedType, PartialState
from accelerate.utils import str_to_bool

from milora_core.errors import MiLoraError


def check_launch() -> None:
    """Looks at how the processes were started, before a backbone is loaded.

    Accelerate leaves FSDP out without a word where there are no GPUs, and DeepSpeed where it is told to stay on the
    CPU; DeepSpeed's processes on CPUs it has know nothing of each other. Under FSDP transformers, which reads the
    launcher's environment by itself, would nevertheless leave the backbone empty in all processes but the first.

    Raises:
        MiLoraError: If FSDP or DeepSpeed is asked for and is not what the processes have.
    """
    kind = PartialState().distributed_type
    if _asked("ACCELERATE_USE_FSDP") and kind in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise MiLoraError(
            "The launcher asks for FSDP, which accelerate has on GPUs alone, in processes that it started itself: "
            "launch without it, on CPUs with --multi_gpu --use_cpu (a whole model each)."
        )
    if _asked("ACCELERATE_USE_DEEPSPEED") and kind in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise MiLoraError(
            "The launcher asks for DeepSpeed, which accelerate leaves out under --use_cpu: leave --use_cpu out, of the "
            "launcher and of milora train. Without GPUs DeepSpeed itself takes the CPU (DS_ACCELERATOR=cpu)."
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if kind is DistributedType.DEEPSPEED and PartialState().num_processes != started:
        raise MiLoraError(
            f"DeepSpeed was launched in {started} processes, and on CPUs accelerate has it in one: each would take "
            "itself for the only one: pass --num_processes 1, or launch without DeepSpeed, with --multi_gpu --use_cpu."
        )


def _asked(name: str) -> bool:
    return bool(str_to_bool(os.environ.get(name, "false")))
