"""Tiny random causal language models, one for each model structure that a tuner must support.

`EXPERTS` and `UNEVEN_EXPERTS` were written by reading transformers' sources, so tests can compare discovered experts
with them. Every model is fp32, in eval mode, without dropout and without an end-of-sequence token.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

VOCABULARY = 97
HIDDEN = 32
PAD = 0


def _build(model_type: str, seed: int = 2, **settings: Any) -> PreTrainedModel:
    """Build a seeded model whose greedy continuations depend on the whole prompt."""
    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCABULARY,
        # A tied head makes a random model repeat its last token: the embedding dominates the residual stream.
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD,
        **settings,
    )
    # Forked, so building a model does not change the test's random numbers.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _scatter(model)
    return model.eval()


@torch.no_grad()
def _scatter(model: PreTrainedModel) -> None:
    """Give every parameter random values large enough that attention and feed-forward layers matter."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    transposed = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    for parameter in model.parameters():
        if id(parameter) in embeddings:
            parameter.normal_()
        elif parameter.ndim == 1:
            # Norm weights keep their neutral value (1, or 0 in Gemma) but differ by channel; biases become non-zero.
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        else:
            # Scaled by fan-in: with one scale for all, a wide feed-forward layer hides the prompt's influence.
            fan_in = parameter.shape[0] if id(parameter) in transposed else parameter.shape[-1]
            parameter.normal_(std=1.5 / fan_in**0.5)


# Shared by the Llama-like configurations: grouped-query attention, head_dim x heads == hidden.
_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "attention_dropout": 0.0,
}
_GPT_LIKE: dict[str, Any] = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 128}
_NO_DROPOUT: dict[str, Any] = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
_MIXTURE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_DEEPSEEK: dict[str, Any] = {
    **_LLAMA_LIKE,
    **_MIXTURE,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}


def _opt(**settings: Any) -> PreTrainedModel:
    return _build(
        "opt",
        hidden_size=HIDDEN,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        dropout=0.0,
        attention_dropout=0.0,
        **settings,
    )


def _falcon(**settings: Any) -> PreTrainedModel:
    return _build(
        "falcon",
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **settings,
    )


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: _build("llama", **_LLAMA_LIKE),
    "mistral": lambda: _build("mistral", sliding_window=4, **_LLAMA_LIKE),
    # q_norm and k_norm; 4 heads x 16 is wider than the hidden size.
    "qwen3": lambda: _build("qwen3", head_dim=16, **_LLAMA_LIKE),
    # Norms before and after; sliding and full attention alternate; soft caps; the embedding is scaled.
    "gemma2": lambda: _build(
        "gemma2",
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=4,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        **_LLAMA_LIKE,
    ),
    "gemma3": lambda: _build(
        "gemma3_text",
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        **_LLAMA_LIKE,
    ),
    # The block's input goes into attention without a norm.
    "olmo2": lambda: _build("olmo2", **_LLAMA_LIKE),
    # Attention and feed-forward read the same norm, in parallel.
    "cohere2": lambda: _build(
        "cohere2",
        sliding_window=4,
        logit_scale=1.0,
        layer_types=["sliding_attention", "full_attention"],
        **_LLAMA_LIKE,
    ),
    "phi3": lambda: _build("phi3", resid_pdrop=0.0, embd_pdrop=0.0, **_LLAMA_LIKE),
    "gpt2": lambda: _build("gpt2", **_GPT_LIKE, **_NO_DROPOUT),
    "gpt_bigcode": lambda: _build("gpt_bigcode", **_GPT_LIKE, **_NO_DROPOUT),
    "gptj": lambda: _build("gptj", rotary_dim=4, **_GPT_LIKE, **_NO_DROPOUT),
    "gpt_neo": lambda: _build(
        "gpt_neo",
        hidden_size=HIDDEN,
        num_layers=2,
        num_heads=4,
        window_size=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=128,
        embed_dropout=0.0,
        attention_dropout=0.0,
        resid_dropout=0.0,
    ),
    "gpt_neox": lambda: _build(
        "gpt_neox",
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    ),
    "bloom": lambda: _build(
        "bloom", hidden_size=HIDDEN, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0
    ),
    "mpt": lambda: _build("mpt", d_model=HIDDEN, n_layers=2, n_heads=4, max_seq_len=128, expansion_ratio=2),
    "falcon": lambda: _falcon(bias=True),
    "falcon_alibi": lambda: _falcon(alibi=True, parallel_attn=False, multi_query=False, bias=True),
    "opt": lambda: _opt(word_embed_proj_dim=HIDDEN),
    # As OPT-350M: norms after the sub-layers, and linear modules outside the blocks.
    "opt_post_norm": lambda: _opt(word_embed_proj_dim=16, do_layer_norm_before=False),
    "mixtral": lambda: _build("mixtral", num_local_experts=4, num_experts_per_tok=2, **_LLAMA_LIKE),
    "qwen2_moe": lambda: _build(
        "qwen2_moe", num_experts=4, shared_expert_intermediate_size=24, decoder_sparse_step=1, **_LLAMA_LIKE, **_MIXTURE
    ),
    # Multi-head latent attention; a shared expert in every block.
    "deepseek_v3": lambda: _build("deepseek_v3", first_k_dense_replace=0, **_DEEPSEEK),
    # Its router is an `nn.Linear` called `gate`, its attention has a `gate_proj`; each block has four norms.
    "afmoe": lambda: _build(
        "afmoe",
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        num_dense_layers=0,
        num_experts=4,
        num_shared_experts=1,
        **_LLAMA_LIKE,
        **_MIXTURE,
    ),
}

_SELF_ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
_LLAMA_EXPERTS = [*_SELF_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
_GPT2_EXPERTS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
_NEOX_MLP = ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
_BLOOM_EXPERTS = ["self_attention.query_key_value", "self_attention.dense", *_NEOX_MLP]
# OPT defines the key projection first and the query projection third.
_OPT_EXPERTS = [
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.q_proj",
    "self_attn.out_proj",
    "fc1",
    "fc2",
]
_LATENT_ATTENTION = [
    "self_attn.q_a_proj",
    "self_attn.q_b_proj",
    "self_attn.kv_a_proj_with_mqa",
    "self_attn.kv_b_proj",
    "self_attn.o_proj",
]
_SHARED_EXPERTS = ["mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj"]

# The linear modules of every block, by path relative to the block, in module order.
EXPERTS: dict[str, list[str]] = {
    "llama": _LLAMA_EXPERTS,
    "mistral": _LLAMA_EXPERTS,
    "qwen3": _LLAMA_EXPERTS,
    "gemma2": _LLAMA_EXPERTS,
    "gemma3": _LLAMA_EXPERTS,
    "olmo2": _LLAMA_EXPERTS,
    "cohere2": _LLAMA_EXPERTS,
    # The output projection is defined before the fused input projection.
    "phi3": ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"],
    "gpt2": _GPT2_EXPERTS,
    "gpt_bigcode": _GPT2_EXPERTS,
    "gptj": ["attn.k_proj", "attn.v_proj", "attn.q_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out"],
    "gpt_neo": [
        "attn.attention.k_proj",
        "attn.attention.v_proj",
        "attn.attention.q_proj",
        "attn.attention.out_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    ],
    "gpt_neox": ["attention.query_key_value", "attention.dense", *_NEOX_MLP],
    "bloom": _BLOOM_EXPERTS,
    "mpt": ["attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj"],
    "falcon": _BLOOM_EXPERTS,
    "falcon_alibi": _BLOOM_EXPERTS,
    "opt": _OPT_EXPERTS,
    "opt_post_norm": _OPT_EXPERTS,
    # The backbone's own experts are stacked parameters instead of modules, and its gate is no `nn.Linear`.
    "mixtral": _SELF_ATTENTION,
    "qwen2_moe": [
        *_SELF_ATTENTION,
        "mlp.shared_expert.gate_proj",
        "mlp.shared_expert.up_proj",
        "mlp.shared_expert.down_proj",
    ],
    "deepseek_v3": [*_LATENT_ATTENTION, *_SHARED_EXPERTS],
    "afmoe": [*_SELF_ATTENTION, "self_attn.gate_proj", *_SHARED_EXPERTS],
}

# The path of the list of blocks in the causal language model.
BLOCKS: dict[str, str] = {
    "llama": "model.layers",
    "mistral": "model.layers",
    "qwen3": "model.layers",
    "gemma2": "model.layers",
    "gemma3": "model.layers",
    "olmo2": "model.layers",
    "cohere2": "model.layers",
    "phi3": "model.layers",
    "gpt2": "transformer.h",
    "gpt_bigcode": "transformer.h",
    "gptj": "transformer.h",
    "gpt_neo": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "bloom": "transformer.h",
    "mpt": "transformer.blocks",
    "falcon": "transformer.h",
    "falcon_alibi": "transformer.h",
    "opt": "model.decoder.layers",
    "opt_post_norm": "model.decoder.layers",
    "mixtral": "model.layers",
    "qwen2_moe": "model.layers",
    "deepseek_v3": "model.layers",
    "afmoe": "model.layers",
}

# Architectures whose blocks differ. Their experts are a mapping from block to list.
UNEVEN_ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    # DeepSeek's first block is dense.
    "deepseek_v3_dense_first": lambda: _build("deepseek_v3", first_k_dense_replace=1, **_DEEPSEEK),
    # The first block has a short convolution instead of attention.
    "lfm2": lambda: _build(
        "lfm2",
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
        **_LLAMA_LIKE,
    ),
}
_LFM2_MLP = ["feed_forward.w1", "feed_forward.w3", "feed_forward.w2"]
UNEVEN_EXPERTS: dict[str, dict[str, list[str]]] = {
    "deepseek_v3_dense_first": {
        "model.layers.0": [*_LATENT_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
        "model.layers.1": [*_LATENT_ATTENTION, *_SHARED_EXPERTS],
    },
    "lfm2": {
        "model.layers.0": ["conv.in_proj", "conv.out_proj", *_LFM2_MLP],
        "model.layers.1": [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.out_proj",
            *_LFM2_MLP,
        ],
    },
}


def random_prompts(count: int, length: int | tuple[int, int], seed: int = 0) -> list[list[int]]:
    """Draw prompts without the padding token, each `length` tokens long; a pair is the (lowest, highest) length."""
    generator = random.Random(seed)
    lowest, highest = (length, length) if isinstance(length, int) else length
    return [
        [generator.randrange(1, VOCABULARY) for _ in range(generator.randint(lowest, highest))] for _ in range(count)
    ]


def pad(prompts: Sequence[Sequence[int]], side: str, pad_id: int = PAD) -> tuple[Tensor, Tensor]:
    """Pad prompts on the `left` or `right` to the longest; return input_ids and attention_mask, both (batch, n)."""
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', not {side!r}")
    longest = max(map(len, prompts))
    input_ids, attention_mask = [], []
    for prompt in prompts:
        filler, ones = longest - len(prompt), [1] * len(prompt)
        left, right = (filler, 0) if side == "left" else (0, filler)
        input_ids.append([pad_id] * left + list(prompt) + [pad_id] * right)
        attention_mask.append([0] * left + ones + [0] * right)
    return torch.tensor(input_ids), torch.tensor(attention_mask)
