"""Options that MiLoRA adapters do not support: loading an adapter is refused with the option's name."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import different, engine, lora_request, run, served
from tenants import PLAIN, Job, expect, random_tokens
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.exceptions import VLLMValidationError

from milora_vllm.options import unsupported

CHANGES: dict[str, tuple[str, str, Any]] = {
    "--speculative-config": ("", "speculative_config", object()),
    "--kv-transfer-config": ("", "kv_transfer_config", object()),
    "--fully-sharded-loras": ("lora_config", "fully_sharded_loras", True),
    "--pipeline-parallel-size": ("parallel_config", "pipeline_parallel_size", 2),
    "--prefill-context-parallel-size": ("parallel_config", "prefill_context_parallel_size", 2),
    "--decode-context-parallel-size": ("parallel_config", "decode_context_parallel_size", 2),
    "--enable-dbo": ("parallel_config", "enable_dbo", True),
    "--runner": ("model_config", "runner_type", "pooling"),
    "--scheduler-cls": ("scheduler_config", "scheduler_cls", dict),
    "--enforce-eager": ("compilation_config", "mode", CompilationMode.VLLM_COMPILE),
    "CUDA graphs": ("compilation_config", "cudagraph_mode", CUDAGraphMode.FULL_DECODE_ONLY),
}


def write_broken(llama: Path, folder: Path, change: dict[str, Any], drop: str = "") -> Path:
    """A copy of an adapter with a changed configuration, or with a file missing."""
    shutil.copytree(llama / "attention", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    if drop:
        (folder / drop).unlink()
    return folder


def test_options_and_adapters_that_are_refused(llama: Path, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    plain = [Job(name, random_tokens(20, torch.Generator().manual_seed(31))) for name in (PLAIN, None)]
    expect(llama, plain)
    with engine(llama, max_num_batched_tokens=100) as llm:
        config = llm.llm_engine.vllm_config
        assert unsupported(config) == []
        for flag, (part, name, value) in CHANGES.items():
            changed = copy.copy(config)
            if part:
                setattr(changed, part, copy.copy(getattr(config, part)))
            object.__setattr__(getattr(changed, part) if part else changed, name, value)
            assert any(flag in problem for problem in unsupported(changed)), flag

        # A step of 100 tokens cannot hold a prompt of 255 and 7 other requests.
        with pytest.raises(ValueError, match="pass --max-num-batched-tokens 263"):
            llm.llm_engine.add_lora(lora_request(llama, "attention"))
        with pytest.raises(VLLMValidationError, match="pass --max-num-batched-tokens 263"):
            run(llm, llama, [Job("attention", [1, 2, 3])])
        window = {"router_window": 48}
        broken = {
            "use_dora": write_broken(llama, tmp_path / "a", {**window, "use_dora": True}),
            "modules_to_save": write_broken(llama, tmp_path / "b", {**window, "modules_to_save": ["lm_head"]}),
            "safetensors": write_broken(llama, tmp_path / "c", window, drop="adapter_model.safetensors"),
            "does not fit": write_broken(llama, tmp_path / "d", {**window, "pooler": "max"}),
            "Unknown gate": write_broken(llama, tmp_path / "e", {**window, "gate": "soft"}),
            "router_window": write_broken(llama, tmp_path / "f", {"router_window": 0}),
            "no LoRA layer": write_broken(llama, tmp_path / "g", {**window, "experts": ["mlp.fc1"] * 7}),
            "max_lora_rank": write_broken(llama, tmp_path / "h", {**window, "r": 64}),
        }
        for number, (message, folder) in enumerate(broken.items(), start=100):
            with pytest.raises(Exception, match=message):
                llm.llm_engine.add_lora(LoRARequest(f"broken{number}", number, str(folder)))

        # Afterwards vLLM still serves everything that it serves without the plugin.
        assert different(run(llm, llama, plain), plain) == []
        good = [Job("window", random_tokens(150, torch.Generator().manual_seed(32)))]
        expect(llama, good)
        assert different(run(llm, llama, good), good) == []
        assert served(llm) is not None


def test_without_milora_adapters_vllm_keeps_its_own_parts(llama: Path) -> None:
    jobs = [Job(name, random_tokens(40, torch.Generator().manual_seed(33))) for name in (PLAIN, None)]
    expect(llama, jobs)
    with engine(llama) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        manager = llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager._adapter_manager
        wrappers = {path: module.punica_wrapper for path, module in manager.modules.items()}
        assert different(run(llm, llama, jobs), jobs) == []
        assert not scheduler.need_mamba_block_aligned_split
        assert all(type(wrapper).__module__.startswith("vllm.") for wrapper in wrappers.values())
        assert served(llm) is None
