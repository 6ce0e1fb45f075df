"""Benchmarks measure the models that users run: shared weights, a bare base, unmodified adapters."""

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from milora.benchmark.decode import DecodeSettings
from milora.benchmark.generating import generate, random_prompts
from milora.benchmark.methods import VARIANTS, build_backbone, build_method
from milora.methods import config_for

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"device": "cpu", "dtype": "float32"}


@pytest.fixture
def settings(tiny_shape: str) -> DecodeSettings:
    return DecodeSettings(backbone=tiny_shape, **SETTINGS).resolved()


def _structure(model: nn.Module) -> list[tuple[str, type, int, int]]:
    return [(n, type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]


def test_base_is_the_bare_backbone_and_all_others_share_its_weights(settings: DecodeSettings) -> None:
    backbone = build_backbone(settings)
    before = _structure(backbone)
    weights = {name: (parameter.data_ptr(), parameter.clone()) for name, parameter in backbone.named_parameters()}
    methods = {name: build_method(name, backbone, settings) for name in VARIANTS}
    assert methods["base"].model is backbone
    assert _structure(backbone) == before
    assert not any(isinstance(module, LoraLayer) for module in backbone.modules())
    places = {place for place, _ in weights.values()}
    for name, method in methods.items():
        model = method.model
        shared = {parameter.data_ptr() for parameter in model.parameters()} & places
        if name == "lora-merged":
            assert not isinstance(model, PeftModel)
            own = [parameter for parameter in model.parameters() if parameter.data_ptr() not in places]
            assert method.own_weights == sum(parameter.nbytes for parameter in own)
            assert len(own) == 14
        else:
            assert shared == places, name
    for name, parameter in backbone.named_parameters():
        assert torch.equal(parameter, weights[name][1]), name


@pytest.mark.parametrize("name", ["lora", "dora-cached", "moelora", "milora", "milora-merged", "midora", "lora-merged"])
def test_outputs_are_those_of_the_same_adapter_outside(name: str, settings: DecodeSettings) -> None:
    backbone = build_backbone(settings)
    # An independent copy of the backbone, with the adapter's tensors loaded under PEFT's keys.
    method = VARIANTS[name].method
    assert method is not None
    outside = get_peft_model(copy.deepcopy(backbone), config_for(method, backbone))
    source = build_method("lora" if name == "lora-merged" else name, backbone, settings)
    outside.load_state_dict(source.model.state_dict())
    outside.eval()
    prompts = random_prompts(backbone, 1, 7, seed=3)
    for beams in (1, 3):
        expected = outside.generate(**prompts, max_new_tokens=6, num_beams=beams, do_sample=False)
        timing = generate(build_method(name, backbone, settings), prompts, CPU, beams=beams, new_tokens=6)
        assert torch.equal(timing.output, expected)
    with torch.no_grad():
        assert not torch.allclose(outside(**prompts).logits, backbone(**prompts).logits, atol=1e-3)


def test_nothing_ends_a_generation_early(settings: DecodeSettings) -> None:
    backbone = build_backbone(settings)
    # In this configuration every token of the vocabulary ends a sequence.
    assert len(backbone.config.eos_token_id) == backbone.config.vocab_size
    for name in ("base", "milora"):
        timing = generate(
            build_method(name, backbone, settings), random_prompts(backbone, 2, 4, 0), CPU, beams=2, new_tokens=9
        )
        assert timing.output.shape == (2, 13)
        assert len(timing.ticks) == 9


def test_prompts_are_routed_differently(settings: DecodeSettings) -> None:
    backbone = build_backbone(settings)
    method = build_method("milora", backbone, settings)
    route = method.model.route(**random_prompts(backbone, 8, 12, seed=1))
    choices = {tuple((gates != 0).flatten().tolist()) for gates in route.gates.transpose(0, 1)}
    assert len(choices) > 1
    assert ((route.gates != 0).sum(-1) == 3).all()


@pytest.mark.parametrize(("adapter_dtype", "expected"), [(None, torch.bfloat16), ("float32", torch.float32)])
def test_adapters_of_all_methods_have_one_dtype(
    adapter_dtype: str | None, expected: torch.dtype, tiny_shape: str
) -> None:
    settings = DecodeSettings(backbone=tiny_shape, device="cpu", adapter_dtype=adapter_dtype).resolved()
    backbone = build_backbone(settings)
    frozen = {id(parameter) for parameter in backbone.parameters()}
    for name in ("lora", "dora", "moelora", "milora", "midora"):
        model = build_method(name, backbone, settings).model
        own = {n: p for n, p in model.named_parameters() if id(p) not in frozen and "router" not in n}
        assert {parameter.dtype for parameter in own.values()} == {expected}, name
        assert all(parameter.any() for parameter in own.values()), name
