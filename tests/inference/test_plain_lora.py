"""A saved LoRA in a MiLoRA model, against PEFT's own LoRA model."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.adapted import ALL_ARCHITECTURES, adapted, saved
from support.architectures import pad, random_prompts
from torch import Tensor, nn

from milora import MiLoraError
from milora.inference.plain_lora import add_lora

INPUT_IDS, ATTENTION_MASK = pad(random_prompts(4, (3, 9), seed=8), "left")


@torch.no_grad()
def logits_of(model: nn.Module, **settings: object) -> Tensor:
    return model(input_ids=INPUT_IDS, attention_mask=ATTENTION_MASK, **settings).logits


def lora(**settings: object) -> PeftModel:
    fields = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    torch.manual_seed(3)
    config = LoraConfig(**{**fields, "init_lora_weights": False, **settings})
    return get_peft_model(ALL_ARCHITECTURES["llama"](), config).eval()


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True, "rank_pattern": {"down_proj": 2}}, {"layers_to_transform": [1]}],
    ids=str,
)
def test_it_is_pefts_lora(settings: dict[str, object], tmp_path: Path) -> None:
    plain = lora(**settings)
    plain.save_pretrained(tmp_path)
    model = adapted().model
    routed = logits_of(model)
    add_lora(model, "plain", tmp_path)
    assert not any(module.training for module in model.modules())
    assert torch.equal(logits_of(model), routed)
    mixed = logits_of(model, adapter_names=["plain", "default", "__base__", "plain"])
    expected = logits_of(plain)
    torch.testing.assert_close(mixed[[0, 3]], expected[[0, 3]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], routed[1], rtol=1e-4, atol=1e-5)
    model.set_adapter("plain")
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)


def test_what_is_no_lora_or_does_not_fit(tmp_path: Path) -> None:
    model = adapted().model
    with pytest.raises(MiLoraError, match="MILORA adapter; add_lora adds LoRA adapters"):
        add_lora(model, "plain", saved(tmp_path / "routed"))
    head = tmp_path / "head"
    lora(target_modules=["lm_head"]).save_pretrained(head, save_embedding_layers=False)
    with pytest.raises(MiLoraError, match="adapts lm_head, which is not a linear module of a block"):
        add_lora(model, "plain", head)
    assert list(model.peft_config) == ["default"]
    with pytest.raises(MiLoraError, match="needs a PEFT model with a MiLoRA adapter"):
        add_lora(lora(), "plain", head)
