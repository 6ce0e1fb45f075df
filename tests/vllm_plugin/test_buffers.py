"""The code path of GPUs through vLLM, with the CPU's kernels: fixed buffers of slots and gates."""

from pathlib import Path

import pytest
import torch
from engines import different, engine, run, served
from tenants import PLAIN, SETTINGS, Job, expect, random_tokens

from milora_vllm import served as served_module
from milora_vllm.batch import Rows
from milora_vllm.buffers import BufferedLinear, Buffers
from milora_vllm.routers import Route


def test_mixed_batches_through_the_buffers(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_module, "uses_buffers", lambda device: True)
    generator = torch.Generator().manual_seed(12)
    jobs = [
        Job(adapter, random_tokens(length, generator))
        for adapter in [*SETTINGS, PLAIN, None]
        for length in (1, 40, 130)
    ]
    expect(llama, jobs)
    with engine(llama, long_prefill_token_threshold=48) as llm:
        for _ in range(2):
            assert different(run(llm, llama, jobs), jobs) == []
        module = served(llm).manager.modules["model.layers.0.self_attn.qkv_proj"]
        assert isinstance(module.punica_wrapper, BufferedLinear)


def test_rows_of_no_adapter_have_no_slot_and_no_gate() -> None:
    buffers = Buffers(2, 3, 8, 4, torch.device("cpu"))
    route = Route(torch.tensor([[1.0, 0, 0.5], [0, 2, 0]]))
    buffers.fill([Rows(2, 5, 3, route)])
    assert buffers.slots.tolist() == [-1, -1, 3, 3, 3, -1, -1, -1]
    expected = torch.zeros(2, 3, 8)
    expected[:, :, 2:5] = route.gates[:, :, None]
    assert torch.equal(buffers.gates, expected)
    buffers.fill([])
    assert buffers.slots.tolist() == [-1] * 8
    assert not buffers.gates.any()


def test_a_new_route_in_the_place_of_an_old_one_is_written() -> None:
    buffers = Buffers(1, 1, 2, 2, torch.device("cpu"))
    for gate in (1.0, 2.0):
        buffers.fill([Rows(0, 1, 0, Route(torch.full((1, 1), gate)))])
        assert buffers.gates[0, 0].tolist() == [gate, 0.0]
