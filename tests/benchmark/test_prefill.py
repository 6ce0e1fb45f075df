"""`milora.benchmark.prefill`: time to first token and the share of routing, on a clock that the test controls."""

from typing import Any

import pytest
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from milora.benchmark import PrefillSettings, prefill
from milora.tuners.milora.router import RouterLayer
from milora_core.errors import MiLoraError


def test_seconds_and_the_routers_share_of_them(tiny_shape: str, clock: Any) -> None:
    clock.slow(LlamaDecoderLayer, "forward", 3.0)
    clock.slow(RouterLayer, "decide", 1.0)
    settings = PrefillSettings(
        backbone=tiny_shape, device="cpu", dtype="float32", methods=("base", "lora", "milora"), batch=2,
        prompt_tokens=(3, 5), rounds=2,
    )  # fmt: skip
    rows = prefill(settings).rows
    # Two blocks of 3 s. MiLoRA has a router of 1 s before each block.
    assert [
        (row["prompt_tokens"], row["method"], row["seconds_to_first_token"], row["routing_share"]) for row in rows
    ] == [
        (tokens, *of)
        for tokens in (3, 5)
        for of in [("base", 6.0, None), ("lora", 6.0, None), ("milora", 8.0, pytest.approx(2 / 8))]
    ]
    assert rows[2]["ratio_to_base"] == rows[2]["ratios"]["lora"]["median"] == pytest.approx(8 / 6)
    # The timers on the routers are removed.
    assert not any("route_block" in vars(module) for module in _routers(settings))


def _routers(settings: PrefillSettings) -> list[RouterLayer]:
    from milora.benchmark.methods import build_backbone, build_method
    from milora.benchmark.routing_time import routing_time

    settings = settings.resolved()
    model = build_method("milora", build_backbone(settings), settings).model
    routers = [module for module in model.modules() if isinstance(module, RouterLayer)]
    with routing_time(model, model.device) as time:
        assert time is not None
        assert len(routers) == 2
        assert all("route_block" in vars(router) for router in routers)
    return routers


def test_compiled_steps_are_no_part_of_it() -> None:
    with pytest.raises(MiLoraError, match="leave compile out"):
        PrefillSettings(compile=True)
