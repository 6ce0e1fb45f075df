"""Fixtures of the vLLM plugin's tests, which need an environment with vLLM: `make test-vllm`."""

import importlib.util
import os

# Without vLLM nothing in this folder is collected. The folder must not be named `vllm`: TRL would find it on the path.
collect_ignore_glob = [] if importlib.util.find_spec("vllm") is not None else ["*.py"]

# Set before vLLM is imported. Waiting threads must not spin, because the tests share their cores.
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
        """A folder with a backbone and adapters of every kind, for each model type."""
        from tenants import write_tenants

        folder = tmp_path_factory.mktemp(request.param)
        write_tenants(folder, request.param)
        return folder

    @pytest.fixture(scope="session")
    def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The same folder for Llama alone."""
        from tenants import write_tenants

        folder = tmp_path_factory.mktemp("tenants")
        write_tenants(folder, "llama")
        return folder
