"""Tests of the plugin, in an environment with vLLM: `make test-vllm`."""

import importlib.util
import os

# Where `tests` is on the path, this folder is found as a package without an origin if vLLM is not installed.
found = importlib.util.find_spec("vllm")
# The main test run collects nothing here.
collect_ignore_glob = [] if found is not None and found.origin is not None else ["*.py"]

# Before vLLM is imported. Waiting threads must not spin: the tests share their cores.
os.environ |= {
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

if not collect_ignore_glob:
    from pathlib import Path

    import pytest
    import torch

    torch.set_num_threads(1)

    @pytest.fixture(scope="session", params=["llama", "qwen3"])
    def each_kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A folder with a backbone and adapters of every kind."""
        from tenants import write_tenants

        folder = tmp_path_factory.mktemp(request.param)
        write_tenants(folder, request.param)
        return folder

    @pytest.fixture(scope="session")
    def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The same with one backbone."""
        from tenants import write_tenants

        folder = tmp_path_factory.mktemp("tenants")
        write_tenants(folder, "llama")
        return folder
