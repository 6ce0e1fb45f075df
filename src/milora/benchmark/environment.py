"""The environment of a measurement."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("milora", "torch", "transformers", "peft", "triton")
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "CUDA_VISIBLE_DEVICES")
MATRIX_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""Instruction sets that determine the speed of matrix products."""


def environment(device: str | torch.device) -> dict[str, Any]:
    """Versions, processor, threads, load, and the GPU if one is used."""
    target = torch.device(device)
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": str(target),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
        "processor": _processor(),
        "instructions": _instructions(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_mib": _memory_mib(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "gpu": None,
    }
    if target.type == "cuda":
        properties = torch.cuda.get_device_properties(target)
        found["gpu"] = {
            "name": properties.name,
            "memory_mib": properties.total_memory // 2**20,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_info(key: str) -> str | None:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def _processor() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _instructions() -> list[str]:
    flags = (_cpu_info("flags") or "").split()
    return [flag for flag in MATRIX_FLAGS if flag in flags]


def _memory_mib() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    except (AttributeError, ValueError, OSError):
        return None
