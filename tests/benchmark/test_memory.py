"""Peak memory, compared with sums of known tensors."""

import pytest
import torch

from milora.benchmark import DecodeSettings, decode
from milora.benchmark.memory import live_bytes, only_new_objects, peak_growth
from milora.benchmark.methods import build_backbone, build_method

CPU = torch.device("cpu")


def test_the_peak_is_what_lives_at_one_time() -> None:
    kept = []

    def run() -> None:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        third = torch.empty(300)
        del second, third
        kept.append(torch.empty(10))

    # 4000 + 2000 at once, later 2000 + 1200; allocators round up by less than 200.
    assert 6000 <= peak_growth(run, CPU) <= 6000 + 200


def test_live_tensors_are_counted_once_by_storage() -> None:
    with only_new_objects():
        before = live_bytes(CPU)
        tensor = torch.zeros(1000)
        view = tensor[10:20]
        assert live_bytes(CPU) - before == 4000
        del tensor
        assert live_bytes(CPU) - before == 4000
        del view
        assert live_bytes(CPU) - before == 0


@pytest.mark.slow
def test_a_row_has_backbone_adapter_and_cache(tiny_shape: str) -> None:
    names = ("base", "lora", "lora-merged", "dora-cached")
    settings = DecodeSettings(
        backbone=tiny_shape, device="cpu", dtype="float32", methods=names, beams=(1,), new_tokens=4, rounds=1
    )
    memory = {row["method"]: row["peak_memory_mib"] * 2**20 for row in decode(settings).rows}
    settings = settings.resolved()
    backbone = build_backbone(settings)
    weights = sum(parameter.nbytes for parameter in backbone.parameters())
    adapter = sum(p.nbytes for p in build_method("lora", backbone, settings).model.parameters()) - weights
    # 2 blocks, keys and values of 2 heads of size 8, 67 tokens; the last token's logits come on top.
    cache = 2 * 2 * 2 * 8 * 67 * 4
    assert weights + cache < memory["base"] < weights + 8 * cache
    assert memory["lora"] - memory["base"] >= adapter
    assert memory["lora"] - memory["base"] < adapter + 2 * cache
    # The memory of a merged adapter alone, although its weights exist next to the shared ones here.
    assert abs(memory["lora-merged"] - memory["base"]) < cache
    # PEFT's cache keeps B A of every module, which is as large as the blocks.
    blocks = sum(parameter.nbytes for parameter in backbone.model.layers.parameters())
    assert memory["dora-cached"] - memory["lora"] > 0.9 * blocks
