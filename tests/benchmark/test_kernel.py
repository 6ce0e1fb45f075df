"""`milora.benchmark.kernel`: bytes and bandwidths computed by hand, on a clock that the test controls."""

import importlib
from typing import Any

import pytest

from milora.benchmark import KernelSettings, kernel
from milora.benchmark.bandwidth import Copy

# In the package this name is the function, not the module.
MODULE = importlib.import_module("milora.benchmark.kernel")


@pytest.mark.parametrize(("active", "rows"), [(1, 5), (2, 3)])
def test_shares_of_the_bandwidth(active: int, rows: int, clock: Any) -> None:
    clock.slow(MODULE, "add_grouped_lora", 0.001)
    clock.slow(MODULE, "grouped_lora_reference", 0.004)
    clock.slow(Copy, "__call__", 0.25)
    settings = KernelSettings(
        device="cpu", dtype="float32", batches=(5,), d_in=32, d_out=48, rank=4, active=active, calls=3, rounds=2
    )
    result = kernel(settings)
    found = {row["method"]: row for row in result.rows}
    # A (4, 32), B (48, 4), x (32), and 48 outputs that are read and written; 4 bytes each.
    needed = rows * 4 * (4 * 32 + 48 * 4 + 32 + 2 * 48)
    copied = 2 * 2**20
    assert {name: row["bytes"] for name, row in found.items()} == {
        "operator": needed, "reference": needed, "copy": copied,
    }  # fmt: skip
    for name, seconds in {"operator": 0.001, "reference": 0.004, "copy": 0.25}.items():
        moved = copied if name == "copy" else needed
        assert found[name]["microseconds"] == pytest.approx(seconds * 1e6)
        assert found[name]["gigabytes_per_second"] == pytest.approx(moved / seconds / 1e9)
        assert found[name]["share_of_bandwidth"] == pytest.approx((moved / seconds) / (copied / 0.25))
    assert found["operator"]["ratios"]["reference"]["median"] == pytest.approx(0.25)
    assert 0 < found["operator"]["largest_error"] < 1e-5
