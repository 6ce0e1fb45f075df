"""The vLLM options that do not work with MiLoRA adapters. Loading an adapter with such an option raises an error."""

from __future__ import annotations

from typing import Any

from milora_core.errors import MiLoraError
from milora_vllm.adapter import AdapterFile

EAGER = "torch.compile or CUDA graphs (pass --enforce-eager)"
"""Routers run in hooks of the blocks. Neither a compiled model nor a replayed graph calls these hooks."""


def check_options(config: Any, file: AdapterFile, name: str) -> None:
    """Checks that vLLM can serve a MiLoRA adapter with these options.

    Args:
        config: The `VllmConfig`.
        file: The adapter.
        name: The adapter's name.

    Raises:
        MiLoraError: If it cannot. The message names each option to change.
    """
    problems = unsupported(config) + _too_small(config, file)
    if problems:
        raise MiLoraError(f"MiLoRA adapter {name!r} cannot be served with: {'; '.join(problems)}.")


def unsupported(config: Any) -> list[str]:
    """The flags of a `VllmConfig`'s options that do not work with any MiLoRA adapter."""
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.platforms import current_platform
    from vllm.v1.core.sched.scheduler import Scheduler

    parallel, compilation, model = config.parallel_config, config.compilation_config, config.model_config
    scheduler, device = config.scheduler_config.get_scheduler_cls(), current_platform.device_type
    is_compiled = compilation.mode not in (None, CompilationMode.NONE)
    has_graphs = compilation.cudagraph_mode not in (None, CUDAGraphMode.NONE)
    found = {
        "--speculative-config": config.speculative_config is not None,
        "--kv-transfer-config": config.kv_transfer_config is not None,
        "--fully-sharded-loras": config.lora_config.fully_sharded_loras,
        "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size > 1,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--enable-dbo and --ubatch-size": parallel.use_ubatching,
        "--runner pooling": model.runner_type != "generate",
        "--scheduler-cls that is not derived from vLLM's Scheduler": not issubclass(scheduler, Scheduler),
        "a hybrid or attention-free model": model.is_hybrid or model.is_attention_free,
        f"the device {device} (only CPUs and CUDA GPUs are supported)": device not in ("cpu", "cuda"),
        EAGER: is_compiled or has_graphs,
    }
    return [flag for flag, is_set in found.items() if is_set]


def _too_small(config: Any, file: AdapterFile) -> list[str]:
    """Checks that a step has room for the deciding tokens of the longest prompt and one token of each other request.

    Otherwise such a prompt would never be scheduled.
    """
    scheduler, longest = config.scheduler_config, config.model_config.max_model_len - 1
    needed = file.span(longest) + scheduler.max_num_seqs
    if scheduler.max_num_batched_tokens >= needed:
        return []
    return [
        f"--max-num-batched-tokens {scheduler.max_num_batched_tokens}: one step must compute up to "
        f"{file.span(longest)} tokens to decide a route; pass --max-num-batched-tokens {needed}, or a smaller "
        "--max-model-len"
    ]
