"""`milora.benchmark.tenants`: numbers of tenants one after the other."""

import gc
import importlib
import weakref
from typing import Any

import pytest

from milora.benchmark import TenantsSettings
from milora.benchmark import tenants as measure
from milora.benchmark.methods import build_method


def test_models_are_gone_before_the_next_are_built(tiny_shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built: dict[int, list[Any]] = {}

    def counted(name: str, backbone: Any, settings: Any, names: Any) -> Any:
        gc.collect()
        assert not [ref for number, refs in built.items() if number != len(names) for ref in refs if ref() is not None]
        method = build_method(name, backbone, settings, names)
        if method.model is not backbone:
            built.setdefault(len(names), []).append(weakref.ref(method.model))
        return method

    # The package has a function of the module's name.
    monkeypatch.setattr(importlib.import_module("milora.benchmark.tenants"), "build_method", counted)
    settings = TenantsSettings(
        backbone=tiny_shape, device="cpu", dtype="float32", methods=("base", "milora"), tenants=(1, 2),
        prompt_tokens=3, new_tokens=2, rounds=1,
    )  # fmt: skip
    rows = measure(settings).rows
    assert [(row["tenants"], row["method"]) for row in rows] == [(n, name) for n in (1, 2) for name in settings.methods]
    assert {number: len(refs) for number, refs in built.items()} == {1: 1, 2: 1}
