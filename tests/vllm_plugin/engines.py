"""vLLM engines in the test process."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tenants import PLAIN, SETTINGS, Job

NAMES = [*SETTINGS, PLAIN]


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """An `LLM` that serves a folder's backbone, with prefix caching and chunked prefill on, as by default."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "enable_lora": True,
        "max_loras": len(NAMES),
        "max_lora_rank": 8,
        "block_size": 32,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 280,
    }
    llm = LLM(str(folder / "backbone"), **{**defaults, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def lora_request(folder: Path, name: str | None, number: int = 0) -> Any:
    """The `LoRARequest` for an adapter in a folder."""
    from vllm.lora.request import LoRARequest

    return None if name is None else LoRARequest(name, number or NAMES.index(name) + 1, str(folder / name))


def run(llm: Any, folder: Path, jobs: Sequence[Job]) -> list[Any]:
    """Continues all jobs greedily in one batch; returns vLLM's outputs."""
    from vllm import SamplingParams

    return llm.generate(  # type: ignore[no-any-return]
        [{"prompt_token_ids": job.prompt} for job in jobs],
        [SamplingParams(max_tokens=job.tokens, temperature=0, ignore_eos=True) for job in jobs],
        lora_request=[lora_request(folder, job.adapter) for job in jobs],
        use_tqdm=False,
    )


def different(outputs: Sequence[Any], jobs: Sequence[Job]) -> list[tuple[str | None, int]]:
    """The adapter and prompt length of each job whose tokens differ from the expected ones."""
    return [
        (job.adapter, len(job.prompt))
        for output, job in zip(outputs, jobs, strict=True)
        if list(output.outputs[0].token_ids) != job.expected
    ]


def cached(outputs: Sequence[Any]) -> int:
    """How many prompt tokens were read from the prefix cache."""
    return sum(output.num_cached_tokens or 0 for output in outputs)


def served(llm: Any) -> Any:
    """The plugin's part of an engine's worker, or `None` before a MiLoRA adapter is loaded."""
    from milora_vllm.patches import served_by

    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    return served_by(runner.lora_manager._adapter_manager)
