"""Decode steps that transformers compiles for a static cache give the tokens of eager steps."""

from __future__ import annotations

import pytest
import torch
from support.architectures import pad, random_prompts
from support.methods import METHODS, adapted
from transformers import CompileConfig

from milora.tuners.generate_options import compiled_settings

PROMPTS = random_prompts(3, (3, 9), seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(METHODS))
def test_a_compiled_step_decodes_as_an_eager_one(name: str) -> None:
    torch._dynamo.reset()
    model = adapted(name, "llama")
    inputs = {**dict(zip(("input_ids", "attention_mask"), pad(PROMPTS, "left"), strict=True)),
              **METHODS[name].arguments(3)}  # fmt: skip
    settings = {"max_new_tokens": 5, "do_sample": False}
    compiled = compiled_settings({"compile_config": CompileConfig(backend="eager", mode=None, fullgraph=False)})
    expected = model.generate(**inputs, **settings)
    # The second run uses the first one's compiled steps.
    for _ in range(2):
        assert torch.equal(model.generate(**inputs, **settings, **compiled), expected)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**inputs, **settings, **compiled), expected)
