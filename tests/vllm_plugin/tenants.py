"""Tiny backbones, adapters of every kind and their expected tokens, computed by the reference without vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.reference import ReferenceMiLora, random_adapter
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

VOCABULARY = 512
EXPERTS = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]
SETTINGS: dict[str, dict[str, Any]] = {
    "attention": {"top_k": 3, "router_activation": "rational"},
    "mean": {"r": 4, "top_k": 2, "gate": "renormalized", "pooler": "mean", "router_norm": "centered"},
    "last": {
        "top_k": 2,
        "gate": "softmax",
        "pooler": "last",
        "router_norm": "pooled",
        "router_activation": ["relu", "relu", "gelu", "gelu"],
    },
    "max": {
        "top_k": 2,
        "pooler": "max",
        "router_norm": "none",
        "experts": ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"],
    },
    "window": {"top_k": 3, "router_window": 48},
    "window_last": {"top_k": 2, "router_window": 48, "pooler": "last"},
    "late": {"top_k": 3, "adapted_tokens": "completion", "pooler": "last"},
    "late_two": {"top_k": 2, "adapted_tokens": "completion", "pooler": "last", "gate": "softmax"},
    "late_mean": {"top_k": 3, "adapted_tokens": "completion", "pooler": "mean"},
    "late_window": {"top_k": 3, "adapted_tokens": "completion", "router_window": 48},
}
"""Covers every pooler, gate, normalisation and kind of routing at least once."""

PLAIN = "plain"


@dataclass
class Job:
    """A prompt and its continuation."""

    adapter: str | None
    prompt: list[int]
    tokens: int = 12
    expected: list[int] = field(default_factory=list)


def make_backbone(kind: str) -> PreTrainedModel:
    """A random backbone whose tokens depend on the whole prompt."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape)) if kind == "llama" else Qwen3ForCausalLM(Qwen3Config(**shape))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, 1.0 if "embed" in name else 0.3 if "lm_head" in name else 0.12)
    model.generation_config.pad_token_id = 0
    return model.eval()


def write_tenants(folder: Path, kind: str) -> None:
    """Writes a backbone, its tokenizer, an adapter for each of [`SETTINGS`], and a plain LoRA."""
    model = make_backbone(kind)
    model.save_pretrained(folder / "backbone")
    _write_tokenizer(folder / "backbone")
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        config = adapter_config(folder, **settings)
        write_adapter(folder / name, config, random_adapter(model, "model.layers", config, seed))
    modules = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    config = {**adapter_config(folder), "peft_type": "LORA", "target_modules": modules}
    tensors = random_adapter(model, "model.layers", config, seed=99)
    plain = {key: tensor for key, tensor in tensors.items() if any(f".{name}.lora" in key for name in modules)}
    write_adapter(folder / PLAIN, config, plain)


def adapter_config(folder: Path, **settings: Any) -> dict[str, Any]:
    """An adapter configuration for the backbone of a folder."""
    config = {
        "peft_type": "MILORA",
        "base_model_name_or_path": str(folder / "backbone"),
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "r": 8,
        "lora_alpha": 8,
        "use_rslora": False,
        "use_dora": False,
        "experts": EXPERTS,
        "top_k": 3,
        "pooler": "attention",
        "router_activation": "gelu",
        "rational_orders": [6, 5],
        "gate": "hard",
        "router_norm": "tokens",
        "adapted_tokens": "all",
        "router_window": None,
        **settings,
    }
    return {**config, "target_modules": [name.rpartition(".")[2] for name in config["experts"]]}


def write_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes an adapter in PEFT's layout."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


def random_tokens(count: int, generator: torch.Generator) -> list[int]:
    """Random prompt tokens, without 0, the unknown word."""
    return torch.randint(1, VOCABULARY, (count,), generator=generator).tolist()


def expect(folder: Path, jobs: Sequence[Job]) -> None:
    """Fills in each job's expected tokens: greedy decoding by the reference in float32."""
    model = LlamaForCausalLM if "llama" in (folder / "backbone" / "config.json").read_text() else Qwen3ForCausalLM
    backbone = model.from_pretrained(folder / "backbone", dtype=torch.float32).eval().requires_grad_(False)
    references: dict[str, ReferenceMiLora] = {}
    for job in jobs:
        ids = torch.tensor([job.prompt])
        if job.adapter in (None, PLAIN):
            job.expected = _continue(folder, backbone, ids, job)
            continue
        assert job.adapter is not None
        if job.adapter not in references:
            config = json.loads((folder / job.adapter / "adapter_config.json").read_text())
            tensors = load_file(folder / job.adapter / "adapter_model.safetensors")
            references[job.adapter] = ReferenceMiLora(backbone, tensors, config)
        job.expected = references[job.adapter].greedy(ids, job.tokens)


@torch.no_grad()
def _continue(folder: Path, backbone: PreTrainedModel, ids: Tensor, job: Job) -> list[int]:
    with plain_lora(backbone, folder / PLAIN if job.adapter else None):
        sequence = ids
        for _ in range(job.tokens):
            logits = backbone(sequence, use_cache=False).logits
            sequence = torch.cat([sequence, logits[:, -1:].argmax(dim=-1)], dim=1)
    return sequence[0, ids.shape[1] :].tolist()


@contextmanager
def plain_lora(backbone: nn.Module, folder: Path | None) -> Iterator[None]:
    """Adds a plain LoRA adapter with scaling 1 to the backbone."""
    hooks = []
    if folder is not None:
        tensors = load_file(folder / "adapter_model.safetensors")
        for key, a in tensors.items():
            if "lora_A" in key:
                b = tensors[key.replace("lora_A", "lora_B")]
                module = backbone.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                hooks.append(module.register_forward_hook(lambda m, args, out, a=a, b=b: out + args[0] @ a.T @ b.T))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
