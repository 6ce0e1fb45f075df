"""A tiny backbone's folder, and a clock that tests control."""

import functools
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from milora.benchmark import bandwidth


@pytest.fixture(scope="session")
def tiny_shape(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("shape")
    LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        # Every token ends the sequence; a measured generation must continue nevertheless.
        eos_token_id=list(range(61)),
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure bandwidth with a small copy instead of half a gigabyte."""
    monkeypatch.setitem(bandwidth.COPIED_BYTES, "cpu", 2**20)


class Clock:
    """A clock that advances only in functions that a test slows down, so timings can be computed by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def slow(self, owner: Any, name: str, seconds: float) -> None:
        """Make every later call of a function take `seconds`."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def slowed(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            return function(*args, **kwargs)

        self._monkeypatch.setattr(owner, name, slowed)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)
