"""The longest text that a model supports, from the configurations of different architectures."""

from __future__ import annotations

import pytest
from support.architectures import ARCHITECTURES

from milora.backbone.positions import positions_of


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mpt", "gemma3"])
def test_tiny_models_have_128(family: str) -> None:
    assert positions_of(ARCHITECTURES[family]()) == 128


def test_a_model_that_sets_no_limit() -> None:
    assert positions_of(ARCHITECTURES["bloom"]()) is None
