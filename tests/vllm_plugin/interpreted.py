"""vLLM's runner V2 on a CPU: Triton's interpreter replaces the driver. Prints the results as JSON.

Run as `python interpreted.py FOLDER`, with the folder that `tenants.write_tenants` wrote.
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

# Set before Triton is imported.
os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}

from triton.backends import backends


class Driver:
    """The driver functions that vLLM calls."""

    @staticmethod
    def is_active() -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


backends["cpu"] = types.SimpleNamespace(driver=Driver, compiler=None)

if __name__ == "__main__":
    import torch
    from engines import cached, different, engine, run
    from tenants import PLAIN, SETTINGS, Job, expect, random_tokens

    folder = Path(sys.argv[1])
    generator = torch.Generator().manual_seed(11)
    jobs = [
        Job(adapter, random_tokens(length, generator)) for adapter in [*SETTINGS, PLAIN, None] for length in (7, 130)
    ]
    growing = [
        Job(adapter, random_tokens(30, generator), 40)
        for adapter in ("attention", "late", "window", "late_mean", PLAIN)
    ]
    expect(folder, jobs + growing)
    with engine(folder, long_prefill_token_threshold=48) as llm:
        runner = type(llm.llm_engine.model_executor.driver_worker.worker.model_runner).__module__
        wrong = different(run(llm, folder, jobs), jobs)
        outputs = run(llm, folder, jobs)
        wrong += different(outputs, jobs)

    from vllm.v1.core.sched.scheduler import Scheduler

    preempted: list[Any] = []
    original = Scheduler._preempt_request
    Scheduler._preempt_request = lambda self, *args, **kwargs: (preempted.append(1), original(self, *args, **kwargs))[1]
    with engine(folder, num_gpu_blocks_override=10, long_prefill_token_threshold=40) as llm:
        wrong += different(run(llm, folder, growing), growing)
    result = {"runner": runner, "wrong": wrong, "cached": cached(outputs), "preempted": len(preempted)}
    print(json.dumps(result))
