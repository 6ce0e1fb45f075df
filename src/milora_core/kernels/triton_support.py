"""Whether Triton is installed, and whether it interprets its kernels on the CPU."""

from __future__ import annotations

import importlib.util
import os
from functools import cache


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU: for tests without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
