"""`milora.benchmark.tenants`: several numbers of tenants, one after the other."""

import gc
import importlib
import weakref
from typing import Any

import pytest
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from milora.benchmark import TenantsSettings
from milora.benchmark import tenants as measure
from milora.benchmark.bandwidth import Copy
from milora.benchmark.methods import build_method
from milora_core.errors import MiLoraError


def test_models_are_gone_before_the_next_are_built(tiny_shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built: dict[int, list[Any]] = {}

    def counted(name: str, backbone: Any, settings: Any, names: Any) -> Any:
        gc.collect()
        assert not [ref for number, refs in built.items() if number != len(names) for ref in refs if ref() is not None]
        method = build_method(name, backbone, settings, names)
        if method.model is not backbone:
            built.setdefault(len(names), []).append(weakref.ref(method.model))
        return method

    # In the package this name is the function, not the module.
    monkeypatch.setattr(importlib.import_module("milora.benchmark.tenants"), "build_method", counted)
    settings = TenantsSettings(
        backbone=tiny_shape, device="cpu", dtype="float32", methods=("base", "milora"), tenants=(1, 2),
        prompt_tokens=3, new_tokens=2, rounds=1,
    )  # fmt: skip
    rows = measure(settings).rows
    assert [(row["tenants"], row["method"]) for row in rows] == [(n, name) for n in (1, 2) for name in settings.methods]
    assert {number: len(refs) for number, refs in built.items()} == {1: 1, 2: 1}


def test_each_tenant_has_an_adapter_in_memory(tiny_shape: str, clock: Any) -> None:
    clock.slow(LlamaDecoderLayer, "forward", 3.0)
    clock.slow(Copy, "__call__", 0.25)
    methods = ("base", "lora", "lora-together", "milora", "midora")
    settings = TenantsSettings(
        backbone=tiny_shape, device="cpu", dtype="float32", methods=methods, tenants=(3,), batch=4, prompt_tokens=3,
        new_tokens=3, rounds=1,
    )  # fmt: skip
    rows = {row["method"]: row for row in measure(settings).rows}
    assert list(rows) == list(methods)
    # r = 32, two blocks of q, k, v, o, gate, up, down; 4 bytes each.
    adapter = 4 * 32 * 2 * (64 + 48 + 48 + 64 + 80 + 80 + 80)
    for name, row in rows.items():
        assert (row["tenants"], row["batch"], row["tokens_per_second"]) == (3, 4, pytest.approx(4 / 6)), name
        more = (row["peak_memory_mib"] - rows["base"]["peak_memory_mib"]) * 2**20
        assert more == 0 if name == "base" else 3 * adapter <= more < 3.5 * adapter, name
        if name != "base":
            ratio = row["peak_memory_mib"] / rows["base"]["peak_memory_mib"]
            assert row["memory_ratios"]["base"] == pytest.approx(ratio)


@pytest.mark.parametrize("name", ["dora", "dora-cached", "moelora", "milora-merged", "lora-merged"])
def test_what_serves_one_adapter_at_a_time_is_refused_before_anything_is_built(name: str) -> None:
    with pytest.raises(MiLoraError, match=f"{name} serves one adapter at a time: give some of base, lora, milora"):
        TenantsSettings(methods=("base", name))
