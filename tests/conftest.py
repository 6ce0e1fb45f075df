"""Settings that every test shares."""

import os
import random

import pytest
import torch
from support.data import DATA_DIR  # noqa: F401, reads MILORA_DATA_DIR

from milora_core.kernels.triton_support import is_interpreted

# Set before anything imports transformers or huggingface_hub, which read them once. No test may use the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

# `support.data` has read it. Commands under test get a folder by flag, or none.
os.environ.pop("MILORA_DATA_DIR", None)

# The models are so small that a second thread costs more than it computes. Processes that tests start read
# the variable.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests that need Triton's interpreter when it is off: another process runs them."""
    if is_interpreted():
        return
    left_out = [item for item in items if item.get_closest_marker("interpreted")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Give every test the same random numbers, whichever tests ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def torchs_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode with torch's products, as on a GPU or on a CPU without a C compiler."""
    monkeypatch.setenv("MILORA_NATIVE", "0")


@pytest.fixture(params=["native", "torch"])
def either_way(request: pytest.FixtureRequest) -> None:
    """Run a test twice: decoding with the native kernel, and with torch's products."""
    from milora_core.kernels.native import library

    if request.param == "torch":
        request.getfixturevalue("torchs_products")
    elif library() is None:
        pytest.skip("there is no C compiler here")
