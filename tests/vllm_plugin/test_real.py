"""A real language model, whose first token's hidden states are a hundred times as long as the others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from engines import different, engine, run
from support.reference import ReferenceMiLora, random_adapter
from tenants import EXPERTS, Job, adapter_config, write_adapter

FOLDER = Path(os.environ.get("MILORA_SMOLLM2") or Path.home() / ".cache" / "milora" / "smollm2-135m-instruct")
PROMPTS = [
    "The three largest cities of France are",
    "Write a polite letter to a customer whose parcel came too late, and offer a refund of half the price.",
]
TOKENS = 4
SETTINGS = {
    "attention": {"router_norm": "centered"},
    "late": {"adapted_tokens": "completion", "pooler": "last"},
    "window": {"router_window": 4, "gate": "renormalized"},
}


@pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the folder that `make smollm2` makes")
def test_smollm2_decodes_what_the_reference_decodes(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    backbone = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    (tmp_path / "backbone").symlink_to(FOLDER)
    ids = [tokenizer(text, return_tensors="pt").input_ids for text in PROMPTS]
    jobs, bare = [], None
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        config = adapter_config(tmp_path, experts=EXPERTS, **settings)
        tensors = random_adapter(backbone, "model.layers", config, seed)
        for key, tensor in tensors.items():
            # Small enough that the texts stay readable.
            if "lora_B" in key:
                tensor *= 0.2
        write_adapter(tmp_path / name, config, tensors)
        reference = ReferenceMiLora(backbone, tensors, config)
        bare = bare or [reference.backbone_greedy(prompt, TOKENS) for prompt in ids]
        jobs += [Job(name, prompt[0].tolist(), TOKENS, reference.greedy(prompt, TOKENS)) for prompt in ids]
    # Otherwise the comparison would show nothing.
    assert sum(job.expected not in bare for job in jobs) >= len(jobs) // 2
    with engine(tmp_path, max_num_batched_tokens=280, long_prefill_token_threshold=16) as llm:
        for _ in range(2):
            assert different(run(llm, tmp_path, jobs), jobs) == []
