"""Models whose weights accelerate offloads between calls."""

from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from support.adapted import adapted, add_adapter
from support.architectures import pad, random_prompts

INPUT_IDS, ATTENTION_MASK = pad(random_prompts(3, (3, 9), seed=2), "left")


def generate(model: PeftModel, **settings: Any) -> list[list[int]]:
    settings = {"max_new_tokens": 5, "do_sample": False, **settings}
    return model.generate(input_ids=INPUT_IDS, attention_mask=ATTENTION_MASK, **settings).tolist()


@pytest.mark.parametrize("settings", [{}, {"gate": "softmax"}], ids=["hard", "soft"])
def test_an_offloaded_model_decodes_as_one_in_memory(settings: dict[str, Any]) -> None:
    model = adapted(**settings).model
    add_adapter(model, "other", seed=7, top_k=3)
    names = ["other", "__base__", "default"]
    expected = [generate(model), generate(model, adapter_names=names), generate(model, num_beams=2)]
    model = adapted(**settings).model
    add_adapter(model, "other", seed=7, top_k=3)
    cpu_offload(model.base_model.model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for name, parameter in model.named_parameters() if "lora_" in name)
    assert [generate(model), generate(model, adapter_names=names), generate(model, num_beams=2)] == expected
    assert all(parameter.is_meta for name, parameter in model.named_parameters() if "lora_" in name)


def test_hooks_of_adapted_layers_are_back_after_serving() -> None:
    model = adapted().model
    calls: list[type[Any]] = []

    class Counting(ModelHook):  # type: ignore[misc]
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(type(module))
            return args, kwargs

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        add_hook_to_module(layer, Counting())
    expected = generate(model)
    called = len(calls)
    assert generate(model, adapter_names=["default"] * 3) == expected
    calls.clear()
    assert generate(model) == expected
    assert len(calls) == called > 0
