"""Models whose prompts have further inputs, or whose state travels under another name than `past_key_values`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.adapted import adapted, perturbed
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from milora import IAPTConfig, MiLoraConfig, MiLoraError
from milora.tuners.milora.router import routers_of

SIZES: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "pad_token_id": 0, "eos_token_id": 59}
STATE_SPACE: dict[str, Any] = {"state_size": 4, "num_hidden_layers": 2, "bos_token_id": 1}


def llava() -> PreTrainedModel:
    text = LlamaConfig(intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, **SIZES)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
        projection_dim=16,
    )  # fmt: skip
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=58,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
        )
    )


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=64, pad_token_id=0, eos_token_id=59)
    )


def mamba() -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(**SIZES, **STATE_SPACE))


def mamba2() -> PreTrainedModel:
    return Mamba2ForCausalLM(Mamba2Config(head_dim=8, num_heads=4, n_groups=1, chunk_size=8, **SIZES, **STATE_SPACE))


def recurrent_gemma() -> PreTrainedModel:
    return RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(
            intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, lru_width=16, attention_window_size=16,
            **SIZES,
        )
    )  # fmt: skip


def with_large_adapter(backbone: PreTrainedModel, **settings: Any) -> PeftModel:
    """An adapter that changes the outputs so much that another route shows."""
    return perturbed(get_peft_model(backbone, MiLoraConfig(r=4, top_k=2, lora_alpha=16, **settings)), 0.5)


def inputs_of(name: str) -> dict[str, Tensor]:
    """A prompt whose further input changes the hidden states that the routers read."""
    if name == "llava":
        ids = torch.cat([torch.full((1, 4), 58), torch.randint(3, 50, (1, 4))], dim=1)
        more = {"pixel_values": torch.randn(1, 3, 8, 8) * 3}
    else:
        ids = torch.randint(3, 50, (1, 8))
        more = {"token_type_ids": torch.randint(3, 50, (1, 8))}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llava", {"prompt_lookup_num_tokens": 2}),
        ("gpt2", {"prompt_lookup_num_tokens": 2}),
        ("gpt2", {"prefill_chunk_size": 3}),
    ],
)
def test_the_pass_that_finds_the_route_reads_all_inputs(name: str, options: dict[str, int]) -> None:
    blocks = {"blocks": "model.language_model.layers"} if name == "llava" else {}
    model = with_large_adapter({"llava": llava, "gpt2": gpt2}[name](), **blocks)
    without = 0
    for _ in range(8):
        inputs = inputs_of(name)
        with model.record_routes() as routes:
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
            model.generate(**inputs, max_new_tokens=3, do_sample=False, **options)
        assert torch.equal(routes[0].gates, routes[1].gates)
        text_only = model.route(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        without += not torch.equal(routes[0].gates, text_only.gates)
    assert without > 0, "the further input changes no route, so the test shows nothing"


def test_iapt_reads_all_inputs_too() -> None:
    model = perturbed(get_peft_model(gpt2(), IAPTConfig(num_virtual_tokens=2, bottleneck=4)), 0.5)
    seen: list[Tensor | None] = []
    model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("token_type_ids")), with_kwargs=True
    )
    inputs = inputs_of("gpt2")
    model.generate(**inputs, prompt_lookup_num_tokens=2, max_new_tokens=6, do_sample=False)
    assert seen[0] is not None, "the pass that computes the soft tokens has no token types"
    assert torch.equal(seen[0], inputs["token_type_ids"])


@pytest.mark.parametrize("build", [mamba, mamba2, recurrent_gemma])
def test_a_state_space_model_routes_once(build: Any) -> None:
    """Against a loop without a cache under the prompt's route."""
    model = with_large_adapter(build())
    ids = torch.randint(2, 50, (2, 7))
    mask = torch.ones_like(ids)
    calls: list[str] = []
    for path, router in routers_of(model).items():
        router.projection["default"].register_forward_hook(lambda *_, path=path: calls.append(path))
    found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert sorted(calls) == sorted(routers_of(model))
    text = ids
    with model.use_route(model.route(input_ids=ids, attention_mask=mask)), torch.no_grad():
        for _ in range(8):
            logits = model(input_ids=text, use_cache=False).logits[:, -1]
            logits[:, 59] = -torch.inf
            text = torch.cat([text, logits.argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(found, text)


def test_an_own_loop_over_a_state_keeps_the_route() -> None:
    model = with_large_adapter(mamba())
    ids = torch.randint(2, 50, (1, 7))
    route = model.route(input_ids=ids)
    with torch.no_grad():
        first = model(input_ids=ids, use_cache=True)
        found = model(input_ids=torch.tensor([[5]]), cache_params=first.cache_params, use_cache=True).logits
        with model.use_route(route):
            expected = model(input_ids=torch.cat([ids, torch.tensor([[5]])], dim=1), use_cache=False).logits
    torch.testing.assert_close(found[:, -1], expected[:, -1], rtol=1e-4, atol=1e-4)


def test_a_state_that_cannot_be_followed_is_refused() -> None:
    model = with_large_adapter(RwkvForCausalLM(RwkvConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2)))
    ids = torch.randint(2, 50, (1, 7))
    with pytest.raises(MiLoraError, match="use_cache=False"):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, use_cache=False
    )
    assert found.shape[1] <= 10
    with model.disable_adapter():
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)


def test_a_loop_over_tuples_keeps_the_route() -> None:
    """With `return_dict=False` the output does not name the cache."""
    model = adapted().model
    ids = torch.tensor([[3, 9, 4, 11, 5]])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, return_dict=False)
        found = model(input_ids=torch.tensor([[7]]), past_key_values=cache, return_dict=False)[0]
        with model.use_route(model.route(input_ids=ids)):
            expected = model(input_ids=torch.tensor([[3, 9, 4, 11, 5, 7]])).logits
    torch.testing.assert_close(found[:, -1], expected[:, -1])
