"""MiLoRA on quantised backbones; tests of a back-end are skipped if it is not installed."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from support.adapted import settings_for
from support.architectures import EXPERTS, VOCABULARY, pad, random_prompts
from support.reference import random_adapter
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from milora import MiLoraConfig
from milora.backbone.blocks import find_blocks

# torchao's layers warn about merging, which MiLoRA never does there; the back-ends import deprecated parts of torch.
pytestmark = [
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning"),
]

PROMPTS = random_prompts(3, (3, 8), seed=1)


def backbone() -> PreTrainedModel:
    """Wider than other tests' backbones, because four-bit formats share one scale among 64 weights of a row."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.2,
    )
    torch.manual_seed(2)
    return LlamaForCausalLM(config).eval()


def replace_linears(model: PreTrainedModel, quantised: Callable[[nn.Linear], nn.Module]) -> PreTrainedModel:
    for block in find_blocks(model):
        for path, linear in block.linears.items():
            parent, _, name = path.rpartition(".")
            setattr(block.module.get_submodule(parent), name, quantised(linear))
    return model


def bitsandbytes_4bit() -> PreTrainedModel:
    bnb = pytest.importorskip("bitsandbytes")

    def quantised(linear: nn.Linear) -> nn.Module:
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        return layer.to("cpu")

    model = replace_linears(backbone(), quantised)
    model.is_loaded_in_4bit = True
    return model


def bitsandbytes_8bit() -> PreTrainedModel:
    bnb = pytest.importorskip("bitsandbytes")

    def quantised(linear: nn.Linear) -> nn.Module:
        layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        return layer.to("cpu")

    model = replace_linears(backbone(), quantised)
    model.is_loaded_in_8bit = True
    return model


def torchao_int8() -> PreTrainedModel:
    quantization = pytest.importorskip("torchao.quantization")
    model = backbone()
    quantization.quantize_(model.model.layers, quantization.Int8WeightOnlyConfig(version=2))
    return model


def hqq_4bit() -> PreTrainedModel:
    core = pytest.importorskip("hqq.core.quantize")
    config = core.BaseQuantizeConfig(nbits=4, group_size=16)

    def quantised(linear: nn.Linear) -> nn.Module:
        return core.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")

    return replace_linears(backbone(), quantised)


BACKENDS = [bitsandbytes_4bit, bitsandbytes_8bit, torchao_int8, hqq_4bit]


@pytest.mark.parametrize("use_dora", [False, True], ids=["milora", "midora"])
@pytest.mark.parametrize("quantised", BACKENDS)
def test_a_quantised_backbone(quantised: Callable[[], PreTrainedModel], use_dora: bool, tmp_path: Path) -> None:
    if use_dora and quantised is bitsandbytes_8bit:
        pytest.importorskip("bitsandbytes")
        pytest.xfail("PEFT's own DoRA fails in the second pass on bitsandbytes' int8 layers on the CPU")
    model = get_peft_model(quantised(), MiLoraConfig(r=4, top_k=2, use_dora=use_dora))
    assert model.peft_config["default"].experts == EXPERTS["llama"]
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 2 * 7
    tensors = random_adapter(backbone(), "model.layers", settings_for("llama", use_dora=use_dora))
    for name, parameter in model.named_parameters():
        if ".default" in name:
            key = name.replace(".default", "")
            parameter.data.copy_(tensors[key.removesuffix(".weight") if "magnitude" in key else key])
    # Saved before the first pass, when bitsandbytes packs its weights for the CPU: saving unpacks them with a loss.
    model.save_pretrained(tmp_path)
    model.eval()
    input_ids, attention_mask = pad(PROMPTS, "left")
    settings = {"max_new_tokens": 4, "do_sample": False}
    together = model.generate(input_ids=input_ids, attention_mask=attention_mask, **settings)
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :]
        assert together[row, input_ids.shape[1] :].tolist() == alone.tolist()
    with model.disable_adapter():
        plain = model.generate(input_ids=input_ids, attention_mask=attention_mask, **settings)
    assert not torch.equal(together, plain)
    loaded = PeftModel.from_pretrained(quantised(), tmp_path)
    with torch.no_grad():  # if gradients may be needed, bitsandbytes uses kernels with other rounding
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
    assert loaded.route(input_ids, attention_mask) == model.route(input_ids, attention_mask)


@pytest.mark.parametrize("quantised", BACKENDS)
def test_rows_with_adapters_of_their_own(quantised: Callable[[], PreTrainedModel]) -> None:
    """Adapters are computed one after the other, because a quantised layer has no stack."""
    model = get_peft_model(quantised(), MiLoraConfig(r=4, top_k=2, init_lora_weights=False))
    model.add_adapter("soft", MiLoraConfig(r=2, top_k=3, gate="softmax", init_lora_weights=False))
    model.eval()
    names = ["soft", "__base__", "default"]
    input_ids, attention_mask = pad(PROMPTS, "left")
    settings = {"max_new_tokens": 4, "do_sample": False}
    together = model.generate(input_ids=input_ids, attention_mask=attention_mask, adapter_names=names, **settings)
    assert not model.base_model.owner.stacks
    rows = {}
    for prompt, name in zip(PROMPTS, names, strict=True):
        with model.disable_adapter() if name == "__base__" else nullcontext():
            if name != "__base__":
                model.set_adapter(name)
            rows[name] = model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
    assert dict(zip(names, together[:, input_ids.shape[1] :].tolist(), strict=True)) == rows


@pytest.mark.parametrize("quantised", BACKENDS)
def test_gradients_reach_adapter_and_router(quantised: Callable[[], PreTrainedModel]) -> None:
    model = get_peft_model(quantised(), MiLoraConfig(r=4, top_k=2, init_lora_weights=False)).train()
    labels = torch.tensor(random_prompts(2, 8))
    input_ids = labels.clone()
    labels[:, :4] = -100
    model(input_ids=input_ids, labels=labels).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert all(gradient.any() for name, gradient in gradients.items() if "projection" in name)
