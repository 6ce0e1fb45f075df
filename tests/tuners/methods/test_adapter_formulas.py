"""Parallel-Adapter and Learned-Adapter against blocks written out by hand, for three block structures."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from support.architectures import ARCHITECTURES, HIDDEN, UNEVEN_ARCHITECTURES, pad, random_prompts
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from milora import MiLoraError
from milora.tuners.learned_adapter import LearnedAdapterConfig
from milora.tuners.parallel_adapter import ParallelAdapterConfig

INPUT_IDS, ATTENTION_MASK = pad(random_prompts(3, (3, 7), seed=1), "left")
BATCH = {"input_ids": INPUT_IDS, "attention_mask": ATTENTION_MASK}
R = 16
Adapters = dict[str, Callable[[Tensor], Tensor]]
"""The functions added in parallel to sub-layers, by the sub-layer's path in the block."""


def llama_block(block: nn.Module, adapters: Adapters, h: Tensor, **arguments: Any) -> Tensor:
    x = block.input_layernorm(h)
    h = h + block.self_attn(hidden_states=x, **arguments)[0] + adapters["self_attn"](x)
    x = block.post_attention_layernorm(h)
    mlp = block.mlp
    return h + mlp.down_proj(functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)) + adapters["mlp"](x)


def opt_block(block: nn.Module, adapters: Adapters, h: Tensor, **arguments: Any) -> Tensor:
    x = block.self_attn_layer_norm(h)
    h = h + block.self_attn(hidden_states=x, **arguments)[0] + adapters["self_attn"](x)
    x = block.final_layer_norm(h)
    return h + block.fc2(functional.relu(block.fc1(x))) + adapters["fc2"](x)


def falcon_block(block: nn.Module, adapters: Adapters, h: Tensor, **arguments: Any) -> tuple[Tensor, None]:
    x = block.input_layernorm(h)
    attention = block.self_attention(x, **arguments)[0] + adapters["self_attention"](x)
    mlp = block.mlp.dense_4h_to_h(functional.gelu(block.mlp.dense_h_to_4h(x))) + adapters["mlp"](x)
    return h + attention + mlp, None


BLOCKS = {
    "llama": (llama_block, "model.layers"),
    "opt": (opt_block, "model.decoder.layers"),
    "falcon": (falcon_block, "transformer.h"),
}


def reference_logits(name: str, adapters: Adapters) -> Tensor:
    """The logits of a bare backbone with its blocks written out; `adapters` by sub-layer path."""
    model = ARCHITECTURES[name]()
    forward, path = BLOCKS[name]
    for index, block in enumerate(model.get_submodule(path)):
        prefix = f"{path}.{index}."
        own = {key.removeprefix(prefix): adapter for key, adapter in adapters.items() if key.startswith(prefix)}
        block.forward = partial(forward, block, own)
    return model(**BATCH).logits


def randomized(model: PeftModel, seed: int = 0) -> PeftModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tensors_of(model: PeftModel, child: str, gradients: bool = False) -> dict[str, dict[str, Tensor]]:
    """An adapter's tensors, or their gradients, by sub-layer and name; tensors are separate leaves."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        if f".{child}.bottleneck.default." in name:
            path, _, tensor = name.removeprefix("base_model.model.").partition(f".{child}.bottleneck.default.")
            value = parameter.grad if gradients else parameter.detach().clone().requires_grad_()
            found.setdefault(path, {})[tensor] = value
    return found


ACTIVATIONS = {
    "relu": lambda z: z.clamp(min=0),
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / 2**0.5)),
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "tanh": lambda z: 1 - 2 / (torch.exp(2 * z) + 1),
    "identity": lambda z: z,
}
OPERATIONS = {
    "identity": lambda z, w: z,
    "scale": lambda z, w: z * w,
    "mix": lambda z, w: z + z @ torch.block_diag(*w).T,
    "gate": lambda z, w: z * 2 / (1 + torch.exp(-z @ torch.block_diag(*w).T)),
}


def beside(t: dict[str, Tensor], activation: str, operation: str = "identity", scale: float = 4.0) -> Callable:
    def adapter(x: Tensor) -> Tensor:
        z = ACTIVATIONS[activation](x @ t["down"].T)
        return scale * OPERATIONS[operation](z, t.get("inner.operation.weight")) @ t["up"].T

    return adapter


def searching(t: dict[str, Tensor], activations: list[str], operations: list[str]) -> Callable:
    def adapter(x: Tensor) -> Tensor:
        z = x @ t["down"].T
        v, w = t["inner.activation_weights"].exp(), t["inner.operation_weights"].exp()
        y = sum(v[i] / v.sum() * ACTIVATIONS[name](z) for i, name in enumerate(activations))
        y = sum(
            w[i] / w.sum() * OPERATIONS[name](y, t.get(f"inner.operations.{name}.weight"))
            for i, name in enumerate(operations)
        )
        return 4.0 * y @ t["up"].T

    return adapter


def assert_agrees(
    model: PeftModel, name: str, child: str, adapter_for: Callable[[str, dict[str, Tensor]], Any]
) -> None:
    """Compares logits and gradients with the blocks written out, and checks that the adapter has an effect."""
    tensors = tensors_of(model, child)
    assert len(tensors) == 4
    expected = reference_logits(name, {path: adapter_for(path, t) for path, t in tensors.items()})
    logits = model(**BATCH).logits
    attended = ATTENTION_MASK.bool()
    torch.testing.assert_close(logits[attended], expected[attended], rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert (model(**BATCH).logits - logits)[attended].abs().max() > 0.05
    weights = torch.randn(expected[attended].shape)
    (expected[attended] * weights).sum().backward()
    (logits[attended] * weights).sum().backward()
    for path, gradients in tensors_of(model, child, gradients=True).items():
        for tensor, gradient in gradients.items():
            of_reference = tensors[path][tensor].grad
            scale = of_reference.abs().max().item()
            torch.testing.assert_close(gradient, of_reference, rtol=1e-3, atol=1e-4 * scale, msg=f"{path}.{tensor}")
            # In the reference, every tensor in the function gets a gradient.
            assert scale > 0


@pytest.mark.parametrize(("activation", "scale"), [("relu", 4.0), ("tanh", 0.5)])
@pytest.mark.parametrize("name", BLOCKS)
def test_parallel_adapter(name: str, activation: str, scale: float) -> None:
    config = ParallelAdapterConfig(bottleneck=R, activation=activation, scale=scale)
    model = randomized(get_peft_model(ARCHITECTURES[name](), config))
    assert_agrees(model, name, "parallel_adapter_", lambda path, t: beside(t, activation, scale=scale))


CHOICES = list(itertools.product(ACTIVATIONS, OPERATIONS))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("first", range(0, len(CHOICES), 4))
def test_learned_adapter_with_an_architecture(name: str, first: int) -> None:
    """Four of the twenty cells at a time, one at each place."""
    paths = tensors_of(get_peft_model(ARCHITECTURES[name](), ParallelAdapterConfig(bottleneck=R)), "parallel_adapter_")
    chosen = dict(zip(paths, CHOICES[first : first + 4], strict=True))
    architecture = {path: {"activation": a, "operation": o} for path, (a, o) in chosen.items()}
    config = LearnedAdapterConfig(bottleneck=R, architecture=architecture)
    model = randomized(get_peft_model(ARCHITECTURES[name](), config))
    assert not model.is_searching
    assert_agrees(model, name, "learned_adapter_", lambda path, t: beside(t, *chosen[path]))


@pytest.mark.parametrize("name", BLOCKS)
def test_learned_adapter_during_the_search(name: str) -> None:
    config = LearnedAdapterConfig(bottleneck=R, operations=["gate", "identity", "mix", "scale"])
    model = randomized(get_peft_model(ARCHITECTURES[name](), config))
    assert model.is_searching
    inner = partial(searching, activations=config.activations, operations=config.operations)
    assert_agrees(model, name, "learned_adapter_", lambda path, t: inner(t))


@pytest.mark.parametrize("config_class", [ParallelAdapterConfig, LearnedAdapterConfig])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_learns_at_both_sublayers(name: str, config_class: type[Any]) -> None:
    """At first the output is unchanged and every tensor has a gradient; with random weights no gradient is zero."""
    backbone = ARCHITECTURES[name]()
    with torch.no_grad():
        bare = backbone(**BATCH).logits
    model = get_peft_model(backbone, config_class(bottleneck=R))
    logits = model(**BATCH).logits
    assert torch.equal(logits, bare)
    logits.square().sum().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(parameter.grad is not None for parameter in trained.values())
    assert sum(name.endswith(".up") for name in trained) == 4
    assert all(parameter.grad.abs().max() > 0 for name, parameter in trained.items() if name.endswith(".up"))
    randomized(model)
    model.zero_grad()
    model(**BATCH).logits.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in trained.values())


@torch.no_grad()
@pytest.mark.parametrize("name", BLOCKS)
def test_decoding_with_a_cache_equals_the_whole_sequence(name: str) -> None:
    config = LearnedAdapterConfig(bottleneck=R, operations=["mix", "gate"])
    model = randomized(get_peft_model(ARCHITECTURES[name](), config))
    generated = model.generate(
        **BATCH, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    mask = functional.pad(ATTENTION_MASK, (0, 5), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(input_ids=generated.sequences, attention_mask=mask, position_ids=positions).logits
    stepwise = torch.stack(generated.logits, dim=1)
    torch.testing.assert_close(stepwise, whole[:, -6:-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_where_input_and_output_are_two_modules(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = randomized(get_peft_model(ARCHITECTURES["opt"](), ParallelAdapterConfig(bottleneck=R))).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**BATCH, use_cache=False).logits[ATTENTION_MASK.bool()].square().sum().backward()
        gradients.append(tensors_of(model, "parallel_adapter_", gradients=True))
    for path, tensors in gradients[0].items():
        for tensor, gradient in tensors.items():
            torch.testing.assert_close(gradients[1][path][tensor], gradient)


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def test_opt_is_left_as_it_was() -> None:
    backbone = ARCHITECTURES["opt"]()
    hooks, keys = hooks_of(backbone), list(backbone.state_dict())
    model = randomized(get_peft_model(backbone, ParallelAdapterConfig(bottleneck=R)))
    with torch.no_grad():
        model(**BATCH)
        layer = model.base_model.layers()["model.decoder.layers.0.fc2"]
        # The layer does not keep the input.
        assert layer._input is None
        with model.disable_adapter():
            model(**BATCH)
        assert layer._input is None
        with pytest.raises(MiLoraError, match=r"layers\.0\.fc2 was called without the module before it"):
            backbone.model.decoder.layers[0].fc2(torch.zeros(1, 64))
    assert hooks_of(backbone) == hooks + 6
    unloaded = model.unload()
    assert hooks_of(unloaded) == hooks
    assert list(unloaded.state_dict()) == keys


@torch.no_grad()
def test_two_adapters_with_sublayers_of_their_own() -> None:
    model = get_peft_model(ARCHITECTURES["llama"](), ParallelAdapterConfig(bottleneck=R, sublayers=["feed_forward"]))
    randomized(model)
    alone = model(**BATCH).logits
    model.add_adapter("other", ParallelAdapterConfig(bottleneck=R // 2, activation="gelu", scale=1.0))
    assert torch.equal(model(**BATCH).logits, alone)
    model.set_adapter("other")
    assert (randomized(model, seed=1)(**BATCH).logits - alone).abs().max() > 0.05
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(model(**BATCH).logits, alone)
    assert list(model.base_model.layers()) == ["model.layers.0.mlp", "model.layers.1.mlp"]


@torch.no_grad()
def test_a_bf16_backbone() -> None:
    model = randomized(get_peft_model(ARCHITECTURES["opt"]().bfloat16(), ParallelAdapterConfig(bottleneck=R)))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)
    logits = model(**BATCH).logits
    assert logits.dtype == torch.bfloat16
    in_fp32 = randomized(get_peft_model(ARCHITECTURES["opt"](), ParallelAdapterConfig(bottleneck=R)))
    expected = in_fp32(**BATCH).logits[ATTENTION_MASK.bool()]
    assert (logits[ATTENTION_MASK.bool()] - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", ["llama", "opt", "lfm2"])
def test_saved_and_loaded(tmp_path: Path, name: str) -> None:
    architectures = {**ARCHITECTURES, **UNEVEN_ARCHITECTURES}
    model = randomized(get_peft_model(architectures[name](), ParallelAdapterConfig(bottleneck=R)))
    model.save_pretrained(tmp_path)
    keys = get_peft_model_state_dict(model)
    assert len(keys) == (6 if name == "lfm2" else 8)
    assert all(key.split(".parallel_adapter_.")[1] in ("bottleneck.down", "bottleneck.up") for key in keys)
    loaded = PeftModel.from_pretrained(architectures[name](), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**BATCH).logits, model(**BATCH).logits)
    with pytest.raises(MiLoraError, match="for another backbone"):
        PeftModel.from_pretrained(ARCHITECTURES["gpt_neox"](), tmp_path)


def llama_2_7b(config: PeftConfig) -> PeftModel:
    with torch.device("meta"):
        return get_peft_model(LlamaForCausalLM(LlamaConfig()), config)


def tunable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_parameters_on_llama_2_7b() -> None:
    assert tunable(llama_2_7b(ParallelAdapterConfig())) == 2 * 2 * 32 * 160 * 4096  # 83.89M
    paths = [f"model.layers.{index}.{name}" for index in range(32) for name in ("self_attn", "mlp")]
    for operation, expected in {"identity": 83_886_080, "scale": 83_896_320, "mix": 84_090_880}.items():
        architecture = {path: {"activation": "relu", "operation": operation} for path in paths}
        found = tunable(llama_2_7b(LearnedAdapterConfig(architecture=architecture)))
        assert found == expected
        assert found == pytest.approx(81.8e6, rel=0.03)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bottleneck": 0}, r"bottleneck must be at least 1; found 0"),
        (
            {"sublayers": []},
            r"sublayers must be a list of one or several of \['attention', 'feed_forward'\]; found \[\]",
        ),
        ({"sublayers": "attention"}, "sublayers must be a list"),
        ({"sublayers": ["attention", "feedforward"]}, r"'feedforward'.*did you mean 'feed_forward'\?"),
        ({"activation": "rleu"}, r"activation has 'rleu'; .*did you mean 'relu'\?"),
    ],
)
def test_a_configuration_that_makes_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MiLoraError, match=message):
        ParallelAdapterConfig(**settings)


def test_a_backbone_without_the_sublayer() -> None:
    backbone = ARCHITECTURES["llama"]()
    for block in backbone.model.layers:
        block.mixer = block.self_attn
        del block.self_attn
    with pytest.raises(MiLoraError, match=r"No block of LlamaForCausalLM has the sub-layer 'attention'.*sublayers="):
        get_peft_model(backbone, ParallelAdapterConfig(bottleneck=R))
    with pytest.raises(MiLoraError, match="cannot be merged"):
        get_peft_model(ARCHITECTURES["llama"](), ParallelAdapterConfig(bottleneck=R)).merge_and_unload()


def test_hidden_states_keep_their_size() -> None:
    model = get_peft_model(ARCHITECTURES["llama"](), ParallelAdapterConfig(bottleneck=R))
    shapes = {name.rpartition(".")[2]: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert shapes == {"down": (R, HIDDEN), "up": (HIDDEN, R)}
