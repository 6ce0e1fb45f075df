"""Settings that every test shares."""

import os
import random

import pytest
import torch

# Set before anything imports transformers or huggingface_hub, which read them once. No test may use the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

# The models are so small that a second thread costs more than it computes.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Give every test the same random numbers, whichever tests ran before it."""
    random.seed(0)
    torch.manual_seed(0)
