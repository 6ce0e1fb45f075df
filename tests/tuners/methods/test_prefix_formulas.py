"""P-tuning v2 and IAPT against attention written out by hand, and problems specific to prefix methods."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from support.architectures import ARCHITECTURES, BLOCKS, UNEVEN_ARCHITECTURES, pad, random_prompts
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache

from milora import MiLoraError
from milora.backbone.blocks import find_blocks
from milora.backbone.key_value import find_input_norm, project_keys_and_values
from milora.backbone.shapes import build
from milora.backbone.sublayers import find_sublayers
from milora.tuners.iapt import IAPTConfig
from milora.tuners.iapt.generator import SoftTokenGenerator
from milora.tuners.ptuning_v2 import PTuningV2Config

METHODS = {
    "ptuning-v2": lambda: PTuningV2Config(num_virtual_tokens=3, projection_dim=6),
    "ptuning-v2-direct": lambda: PTuningV2Config(num_virtual_tokens=3, projection_dim=None),
    "iapt": lambda: IAPTConfig(num_virtual_tokens=2, bottleneck=8),
}
PREFIXED = [
    *("llama", "mistral", "qwen3", "gemma2", "gemma3", "olmo2", "cohere2", "phi3", "gpt2", "gpt_neox", "opt"),
    *("opt_post_norm", "mixtral", "qwen2_moe", "afmoe"),
]
WINDOW = 4
INPUT_IDS, ATTENTION_MASK = pad(random_prompts(3, (5, 9), seed=1), "left")
BATCH = {"input_ids": INPUT_IDS, "attention_mask": ATTENTION_MASK}

each_method = pytest.mark.parametrize("method", ["ptuning-v2", "iapt"])


def adapted(method: str, family: str = "llama", implementation: str | None = None) -> PeftModel:
    """A tiny backbone in eval mode whose new adapter has an effect."""
    backbone = ARCHITECTURES[family]()
    if implementation is not None:
        backbone.set_attn_implementation(implementation)
    model = get_peft_model(backbone, METHODS[method]())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def layers_of(model: PeftModel) -> list[Any]:
    return list(model.base_model.layers().values())


@contextmanager
def recorded(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Records a module's input and output."""
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen["input"] = args[0] if args else kwargs["hidden_states"]
        seen["output"] = output[0] if isinstance(output, tuple) else output

    handle = module.register_forward_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def counted(model: PeftModel) -> Iterator[list[str]]:
    """The layers whose generators are called, in call order."""
    calls: list[str] = []
    handles = [
        layer.generator["default"].register_forward_hook(lambda *_, path=layer.path: calls.append(path))
        for layer in layers_of(model)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def rotated(x: Tensor, base: float = 10000.0) -> Tensor:
    """Rotates (batch, heads, tokens, head_dim) by position; features i and i + head_dim / 2 form a complex number."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[2])[:, None] * base ** (-torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


def attention_by_hand(attention: nn.Module, x: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """Llama's attention on left-padded rows, token by token and head by head, with a prefix for each row."""
    head_dim = attention.head_dim
    query, key, value = (
        projection(x).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = rotated(query), rotated(key)
    shared = query.shape[1] // key.shape[1]
    result = torch.zeros_like(query)
    for row in range(x.shape[0]):
        for head in range(query.shape[1]):
            of_head = head // shared
            for i in range(x.shape[1]):
                first = 0 if window is None else max(0, i - window + 1)
                seen = [j for j in range(first, i + 1) if ATTENTION_MASK[row, j]]
                all_keys = torch.cat([keys[row, of_head], key[row, of_head, seen]])
                all_values = torch.cat([values[row, of_head], value[row, of_head, seen]])
                scores = all_keys @ query[row, head, i] / math.sqrt(head_dim)
                result[row, head, i] = scores.softmax(dim=0) @ all_values
    return attention.o_proj(result.transpose(1, 2).flatten(2))


def by_head(projected: Tensor, head_dim: int) -> Tensor:
    return projected.unflatten(-1, (-1, head_dim)).transpose(-2, -3)


def rational(activation: Any, x: Tensor) -> Tensor:
    numerator = sum(a * x**j for j, a in enumerate(activation.numerator))
    return numerator / (1 + sum(b * x ** (i + 1) for i, b in enumerate(activation.denominator)).abs())


def soft_tokens_by_hand(generator: SoftTokenGenerator, hidden: Tensor) -> Tensor:
    """The soft tokens of one unpadded prompt, (tokens, d)."""
    between = hidden @ generator.down.T
    pooled = [(between @ query).softmax(dim=0) @ between for query in generator.pooler]
    return rational(generator.activation, torch.stack(pooled)) @ generator.up.T


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "window"), [("llama", None), ("mistral", WINDOW)])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_attention_is_the_formulas(method: str, family: str, window: int | None, implementation: str) -> None:
    model = adapted(method, family, implementation)
    blocks = model.base_model.model.model.layers
    for block, layer in zip(blocks, layers_of(model), strict=True):
        attention = block.self_attn
        with recorded(attention) as of_attention, recorded(block) as of_block:
            model(**BATCH)
        if method == "iapt":
            prompts = [of_block["input"][row, mask.bool()] for row, mask in enumerate(ATTENTION_MASK)]
            soft = torch.stack([soft_tokens_by_hand(layer.generator["default"], prompt) for prompt in prompts])
            normed = block.input_layernorm.weight * soft / (soft.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            keys, values = attention.k_proj(normed), attention.v_proj(normed)
        else:
            vectors = layer.vectors["default"]
            projected = vectors.seed if vectors.projection is None else vectors.seed @ vectors.projection.T
            keys, values = projected.unsqueeze(1).expand(-1, len(INPUT_IDS), -1, -1)
        keys, values = by_head(keys, attention.head_dim), by_head(values, attention.head_dim)
        expected = attention_by_hand(attention, of_attention["input"], keys, values, window)
        attended = ATTENTION_MASK.bool()
        torch.testing.assert_close(of_attention["output"][attended], expected[attended], rtol=1e-4, atol=1e-4)


def test_padding_never_enters_a_generator() -> None:
    generator = SoftTokenGenerator(12, 6, 2, (6, 5))
    hidden, prompt = torch.randn(2, 5, 12), torch.tensor([[False, False, True, True, True], [True] * 4 + [False]])
    alone = [hidden[row, prompt[row]][None] for row in range(2)]
    expected = [generator(h, torch.ones(h.shape[:2], dtype=torch.bool))[0] for h in alone]
    hidden[~prompt] = float("nan")
    torch.testing.assert_close(generator(hidden, prompt), torch.stack(expected))


@pytest.mark.parametrize("family", PREFIXED)
@torch.no_grad()
def test_keys_and_values_are_the_layers_own(family: str) -> None:
    """Compares the inputs of attention, apart from the rotation, which does not change the first position."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen[module] = key, value
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register("recording", record)
    AttentionMaskInterface.register("recording", AttentionMaskInterface()["sdpa"])
    model = ARCHITECTURES[family]()
    model.set_attn_implementation("recording")
    for block in find_blocks(model):
        path = find_sublayers(block)["attention"].output_path
        attention = block.module.get_submodule(path)
        norm = find_input_norm(block)
        with recorded(block.module) as of_block:
            model(INPUT_IDS)
        x = of_block["input"] if norm is None else block.module.get_submodule(norm)(of_block["input"])
        key, value = project_keys_and_values(attention, path, x)
        torch.testing.assert_close(value, seen[attention][1])
        torch.testing.assert_close(key[:, :, 0], seen[attention][0][:, :, 0])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "gpt_neox"])
@each_method
def test_no_dynamic_and_static_caches_agree(method: str, family: str) -> None:
    model = adapted(method, family)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    for beams in (1, 3):
        expected = model.generate(**BATCH, **settings, num_beams=beams, use_cache=False)
        assert torch.equal(model.generate(**BATCH, **settings, num_beams=beams), expected)
        static = model.generate(**BATCH, **settings, num_beams=beams, cache_implementation="static")
        assert torch.equal(static, expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@each_method
@torch.no_grad()
def test_a_callers_own_loop_goes_on_from_its_cache(method: str, family: str) -> None:
    model = adapted(method, family)
    tokens = torch.tensor(random_prompts(2, 9))
    prompt = torch.zeros_like(tokens, dtype=torch.bool)
    prompt[:, :5] = True
    if method == "iapt":
        with model.base_model.use_prompt(prompt):
            expected = model(input_ids=tokens, use_cache=False).logits
    else:
        expected = model(input_ids=tokens, use_cache=False).logits
    caches = [DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)]
    for cache in caches:
        # The prompt, three tokens at once, one token.
        parts = [model(input_ids=part, past_key_values=cache).logits for part in tokens.split([5, 3, 1], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)


@each_method
@torch.no_grad()
def test_positions_and_caches_are_those_of_the_backbone(method: str) -> None:
    model = adapted(method)
    cache = model(**BATCH).past_key_values
    assert cache.get_seq_length() == INPUT_IDS.shape[1]
    mask, first = ATTENTION_MASK, model.base_model.model.model.layers[0].self_attn
    with recorded(first) as of_attention:
        model(input_ids=INPUT_IDS, attention_mask=mask)
    key = by_head(first.k_proj(of_attention["input"]), first.head_dim)
    torch.testing.assert_close(cache.layers[0].keys, rotated(key))


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 2}],
    ids=lambda settings: next(iter(settings), "greedy"),
)
def test_soft_tokens_are_written_once_a_prompt(settings: dict[str, Any]) -> None:
    model = adapted("iapt")
    tokens = INPUT_IDS[ATTENTION_MASK.all(dim=1)][:1] if "prompt_lookup_num_tokens" in settings else INPUT_IDS
    with counted(model) as calls:
        output = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=5, **settings)
    assert calls == [layer.path for layer in layers_of(model)]
    if "prompt_lookup_num_tokens" in settings:
        plain = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=5)
        assert torch.equal(output, plain)


@torch.no_grad()
def test_the_prompt_ends_where_supervision_begins() -> None:
    model = adapted("iapt")
    assert INPUT_IDS.shape[1] == 9
    prompt = ATTENTION_MASK.bool() & (torch.arange(9) < 6)
    labels = INPUT_IDS.masked_fill(torch.arange(9) < 6, -100)
    with model.base_model.use_prompt(prompt):
        expected = model(**BATCH).logits
    assert torch.equal(model(**BATCH, labels=labels).logits, expected)
    assert not torch.allclose(model(**BATCH).logits, expected, atol=1e-3)


@torch.no_grad()
def test_projections_are_computed_once_until_a_parameter_changes() -> None:
    model = adapted("ptuning-v2")
    vectors = layers_of(model)[0].vectors["default"]
    first = vectors()
    model.generate(**BATCH, max_new_tokens=3)
    assert vectors() is first
    vectors.projection.mul_(2)
    torch.testing.assert_close(vectors(), 2 * first)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_starts_close_to_the_backbone(method: str) -> None:
    backbone = ARCHITECTURES["llama"]()
    with torch.no_grad():
        expected = backbone(**BATCH).logits.log_softmax(-1)
        model = get_peft_model(backbone, METHODS[method]()).eval()
        for layer in layers_of(model) if method == "ptuning-v2" else []:
            assert not layer.vectors["default"]().any()
        actual = model(**BATCH).logits.log_softmax(-1)
    divergence = (expected.exp() * (expected - actual)).sum(-1)[ATTENTION_MASK.bool()].mean()
    assert 0 < divergence < 1.0


@each_method
def test_attention_is_as_it_was_when_the_last_adapter_has_gone(method: str) -> None:
    model = adapted(method)
    backbone = model.base_model.model
    assert backbone.config._attn_implementation == "sdpa_with_prefix"
    model.add_adapter("second", METHODS[method]())
    model.delete_adapter("second")
    assert backbone.config._attn_implementation == "sdpa_with_prefix"
    model.delete_adapter("default")
    assert backbone.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())
    model = adapted(method, implementation="eager")
    assert model.unload().config._attn_implementation == "eager"


def test_checkpointed_blocks_are_as_they_were_after_unloading() -> None:
    model = adapted("iapt").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    functions = [block._gradient_checkpointing_func for block in model.base_model.model.model.layers]
    model(**BATCH, labels=INPUT_IDS.masked_fill(torch.arange(9) < 6, -100)).loss.backward()
    blocks = model.unload().model.layers
    assert [block._gradient_checkpointing_func for block in blocks] == functions


@pytest.mark.parametrize(
    "family", ["bloom", "mpt", "falcon", "falcon_alibi", "gpt_bigcode", "gptj", "gpt_neo", "deepseek_v3"]
)
@each_method
def test_other_attention_is_refused(method: str, family: str) -> None:
    model = ARCHITECTURES[family]()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(MiLoraError, match=rf"{BLOCKS[family]}\.0\..*MiLoRA"):
        get_peft_model(model, METHODS[method]())
    assert [name for name, _ in model.named_modules()] == names


@each_method
def test_other_implementations_are_refused(method: str) -> None:
    model = ARCHITECTURES["llama"]()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(MiLoraError, match=r"'flex_attention'.*attn_implementation='sdpa'"):
        get_peft_model(model, METHODS[method]())
    model = adapted(method)
    model.base_model.model.set_attn_implementation("eager")
    with pytest.raises(MiLoraError, match="set to 'eager' after"):
        model(**BATCH)


def test_blocks_without_attention_are_left_out() -> None:
    model = get_peft_model(UNEVEN_ARCHITECTURES["lfm2"](), PTuningV2Config(num_virtual_tokens=2))
    assert [layer.path for layer in layers_of(model)] == ["model.layers.1.self_attn"]


def test_filled_caches_are_refused() -> None:
    model, backbone = adapted("iapt"), ARCHITECTURES["llama"]()
    cache = backbone(INPUT_IDS[:, :4]).past_key_values
    with pytest.raises(MiLoraError, match="empty cache"):
        model.generate(input_ids=INPUT_IDS, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(MiLoraError, match="empty cache"):
        model(input_ids=INPUT_IDS[:, 4:5], past_key_values=cache)


def test_a_block_on_its_own_is_refused() -> None:
    model = adapted("iapt")
    block = model.base_model.model.model.layers[0]
    with pytest.raises(RuntimeError, match="called directly"):
        block.input_layernorm(torch.randn(1, 3, 32))


@pytest.mark.parametrize(
    "settings",
    [{"num_virtual_tokens": 0}, {"bottleneck": 0}, {"rational_orders": [6]}, {"rational_orders": [6, 0]}],
)
def test_impossible_iapt_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(MiLoraError, match=next(iter(settings))):
        IAPTConfig(**settings)


@pytest.mark.parametrize("settings", [{"num_virtual_tokens": 0}, {"projection_dim": 0}])
def test_impossible_ptuning_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(MiLoraError, match=next(iter(settings))):
        PTuningV2Config(**settings)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PTuningV2Config(), 32 * (2 * 16 * 640 + 640 * 4096)),
        (PTuningV2Config(projection_dim=None), 32 * 2 * 16 * 4096),
        # Plus the 7 + 5 coefficients of a rational activation in each layer.
        (IAPTConfig(), 32 * (2 * 320 * 4096 + 320 * 4 + 12)),
    ],
)
def test_parameters_on_llama_2_7b(config: PeftConfig, expected: int) -> None:
    with torch.device("meta"):
        model = get_peft_model(build("llama-2-7b"), config, low_cpu_mem_usage=True)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
