"""Deselects tests that need Triton's interpreter when it is off: another process runs them."""

from __future__ import annotations

import pytest

from milora_core.kernels.triton_support import is_interpreted


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if is_interpreted():
        return
    left_out = [item for item in items if item.get_closest_marker("interpreted")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
