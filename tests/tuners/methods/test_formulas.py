"""BitFit, (IA)3 and MOELoRA against their equations, computed module by module without the implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from support.architectures import ARCHITECTURES, random_prompts
from support.methods import METHODS, randomize
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from milora import MiLoraError
from milora.backbone.shapes import build
from milora.tuners.bitfit import BitFitConfig
from milora.tuners.ia3 import IA3ProjectedConfig
from milora.tuners.moelora import MoeLoraConfig
from milora.tuners.moelora.gates import top_gates

TOKENS = torch.tensor(random_prompts(2, 6))
PREFIX = "base_model.model."


def model_with(family: str, config: PeftConfig, spread: float = 0.3) -> PeftModel:
    """A tiny backbone with an adapter whose parameters are far from their initial values."""
    model = get_peft_model(ARCHITECTURES[family](), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """`W x + b` by hand."""
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    return functional.linear(x, weight, module.bias)


class Observed:
    """The inputs and outputs of every adapted module in one forward pass."""

    def __init__(self, model: PeftModel, **arguments: Any) -> None:
        self.backbone = model.get_base_model()
        self.tensors = get_peft_model_state_dict(model)
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.paths = list(model.base_model.targeted_module_names)
        handles = [self.module(path).register_forward_hook(self._observe(path)) for path in self.paths]
        with torch.no_grad():
            model(input_ids=TOKENS, **arguments)
        for handle in handles:
            handle.remove()

    def module(self, path: str) -> nn.Module:
        return self.backbone.get_submodule(path)

    def tensor(self, path: str, name: str) -> Tensor:
        return self.tensors[f"{PREFIX}{path}.{name}"]

    def _observe(self, path: str) -> Any:
        def observe(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            # Falcon adds to a module's output in place.
            self.inputs[path], self.outputs[path] = args[0], output.clone()

        return observe


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ BitFit and (IA)3


@pytest.mark.parametrize("dimension", [5, None])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_bitfit(family: str, dimension: int | None) -> None:
    seen = Observed(model_with(family, BitFitConfig(projection_dim=dimension)))
    assert len(seen.paths) == {"llama": 14, "gpt2": 8, "opt": 12}[family]
    for path in seen.paths:
        seed = seen.tensor(path, "bitfit_.bias_vector.seed")
        vector = seed if dimension is None else seen.tensor(path, "bitfit_.bias_vector.projection") @ seed
        close(seen.outputs[path], linear(seen.module(path), seen.inputs[path]) + vector)


IA3_MODULES = {
    "llama": ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"],
    "opt": ["self_attn.k_proj", "self_attn.q_proj", "fc1"],
    "gpt2": ["attn.c_attn", "mlp.c_fc"],
    "phi3": ["self_attn.qkv_proj", "mlp.gate_up_proj"],
    "falcon": ["self_attention.query_key_value", "mlp.dense_h_to_4h"],
    "gpt_neox": ["attention.query_key_value", "mlp.dense_h_to_4h"],
    "gptj": ["attn.k_proj", "attn.q_proj", "mlp.fc_in"],
    "mpt": ["attn.Wqkv", "ffn.up_proj"],
    "deepseek_v3": ["self_attn.q_b_proj", "self_attn.kv_b_proj", "mlp.shared_experts.up_proj"],
}


@pytest.mark.parametrize("dimension", [5, None])
@pytest.mark.parametrize("family", list(IA3_MODULES))
def test_ia3(family: str, dimension: int | None) -> None:
    model = model_with(family, IA3ProjectedConfig(projection_dim=dimension))
    assert model.peft_config["default"].modules == IA3_MODULES[family]
    seen = Observed(model)
    for path in seen.paths:
        seed = seen.tensor(path, "ia3_projected_.scale_vector.seed")
        vector = seed if dimension is None else seen.tensor(path, "ia3_projected_.scale_vector.projection") @ seed
        close(seen.outputs[path], (1 + vector) * linear(seen.module(path), seen.inputs[path]))


def test_classic_ia3_is_that_of_peft() -> None:
    ours = model_with("llama", IA3ProjectedConfig(projection_dim=None))
    theirs = get_peft_model(
        ARCHITECTURES["llama"](),
        IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj", "k_proj", "up_proj"], feedforward_modules=[]),
    ).eval()
    factors = dict(theirs.named_parameters())
    with torch.no_grad():
        for key, vector in get_peft_model_state_dict(ours).items():
            path = key.removesuffix(".ia3_projected_.scale_vector.seed")
            factors[f"{path}.ia3_l.default"].copy_(1 + vector[:, None])
        close(ours(TOKENS).logits, theirs(TOKENS).logits)


@pytest.mark.parametrize("config", [BitFitConfig(projection_dim=None), IA3ProjectedConfig(projection_dim=None)])
def test_classic_forms_are_saved(config: PeftConfig, tmp_path: Path) -> None:
    model = model_with("gpt2", config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(ARCHITECTURES["gpt2"](), tmp_path)
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_ia3_asks_for_names_that_it_does_not_know() -> None:
    with pytest.raises(MiLoraError, match=r"up-projection.*target_modules.*self_attn.q_proj.*self_attn.o_proj"):
        get_peft_model(ARCHITECTURES["mixtral"](), IA3ProjectedConfig())
    model = get_peft_model(ARCHITECTURES["mixtral"](), IA3ProjectedConfig(target_modules=["q_proj", "v_proj"]))
    assert model.peft_config["default"].modules == ["self_attn.q_proj", "self_attn.v_proj"]


# --------------------------------------------------------------------------------------------------------- MOELoRA

EXPERTS, RANKS, TOP = 8, 4, 4
"""As in the paper: 8 experts per module with 4 rank-1 LoRAs each, 4 experts per token."""

# If the router does not read the module's own input: the last modules that were called with hidden states.
READ_FROM = {
    "llama": {"mlp.down_proj": "mlp.up_proj"},
    # Its heads together are wider than the hidden states.
    "qwen3": {"self_attn.o_proj": "self_attn.v_proj", "mlp.down_proj": "mlp.up_proj"},
    "gpt2": {"mlp.c_proj": "mlp.c_fc"},
    "phi3": {"mlp.down_proj": "mlp.gate_up_proj"},
    "opt": {"fc2": "fc1"},
    "falcon": {"mlp.dense_4h_to_h": "mlp.dense_h_to_4h"},
    "mpt": {"ffn.down_proj": "ffn.up_proj"},
    # Latent attention: the router reads inputs directly even if they are narrower than the hidden states.
    "deepseek_v3": {},
}


def experts_sum(seen: Observed, path: str, x: Tensor, gates: list[float], scale: float) -> Tensor:
    """`s sum_i g_i B_i A_i x` for one token, expert by expert, each a sum of rank-1 LoRAs."""
    down, up = (seen.tensor(path, f"moelora_.lora.lora_{half}.weight") for half in "AB")
    total = torch.zeros(len(up))
    for expert, gate in enumerate(gates):
        for rank in range(expert * RANKS, (expert + 1) * RANKS):
            total += scale * gate * up[:, rank] * (down[rank] @ x)
    return total


def token_gates(weight: Tensor, x: Tensor, top: int) -> list[float]:
    probabilities = torch.softmax(weight @ x, dim=0).tolist()
    kept = sorted(range(EXPERTS), key=lambda expert: (-probabilities[expert], expert))[:top]
    total = sum(probabilities[expert] for expert in kept)
    return [probabilities[expert] / total if expert in kept else 0.0 for expert in range(EXPERTS)]


@pytest.mark.parametrize("family", list(READ_FROM))
def test_moelora_by_token(family: str) -> None:
    seen = Observed(model_with(family, MoeLoraConfig(lora_alpha=24)))
    for path in seen.paths:
        block, name = _split(path)
        inputs = seen.inputs[path].flatten(0, -2)
        read = seen.inputs[f"{block}.{READ_FROM[family].get(name, name)}"].flatten(0, -2)
        assert seen.tensor(path, "moelora_.router.weight").shape == (EXPERTS, read.shape[-1])
        base = linear(seen.module(path), inputs)
        for token, (x, h) in enumerate(zip(inputs, read, strict=True)):
            gates = token_gates(seen.tensor(path, "moelora_.router.weight"), h, TOP)
            expected = base[token] + experts_sum(seen, path, x, gates, 24 / 32)
            close(seen.outputs[path].flatten(0, -2)[token], expected)


def _split(path: str) -> tuple[str, str]:
    """Splits a module's path into its block and the path within the block."""
    parts = path.split(".")
    index = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: index + 1]), ".".join(parts[index + 1 :])


@pytest.mark.parametrize("family", ["llama", "opt", "deepseek_v3"])
def test_moelora_by_task(family: str) -> None:
    config = MoeLoraConfig(lora_alpha=24, gate="task", num_tasks=3, task_embedding_dim=5)
    seen = Observed(model_with(family, config, spread=0.6), task_ids=torch.tensor([2, 0]))
    embedding = seen.tensors[f"{PREFIX}moelora_.task_gate.embedding.weight"]
    projection = seen.tensors[f"{PREFIX}moelora_.task_gate.projection.weight"]
    assert (embedding.shape, projection.shape) == ((3, 5), (EXPERTS, 5))
    for path in seen.paths:
        inputs, outputs = seen.inputs[path].flatten(0, -2), seen.outputs[path].flatten(0, -2)
        base = linear(seen.module(path), inputs)
        for token, x in enumerate(inputs):
            task = [2, 0][token // TOKENS.shape[1]]
            gates = torch.softmax(projection @ embedding[task], dim=0).tolist()
            close(outputs[token], base[token] + experts_sum(seen, path, x, gates, 24 / 32))


def test_a_tie_goes_to_the_lowest_index() -> None:
    assert torch.equal(top_gates(torch.zeros(2, 3, 8), 4)[1, 2], torch.tensor([0.25] * 4 + [0.0] * 4))
    assert top_gates(torch.tensor([0.0, 1.0, 1.0, 1.0]), 2).tolist() == [0.0, 0.5, 0.5, 0.0]
    model = model_with("llama", MoeLoraConfig())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.zero_()
    seen = Observed(model)
    path = seen.paths[0]
    expected = experts_sum(seen, path, seen.inputs[path][0, 0], [0.25] * 4 + [0.0] * 4, 2.0)
    close(seen.outputs[path][0, 0], linear(seen.module(path), seen.inputs[path][0, 0]) + expected)


def test_routers_stay_in_float32() -> None:
    model = model_with("llama", MoeLoraConfig())
    expected = {n: p.detach().clone() for n, p in model.named_parameters() if ".router." in n}
    model = model.to(torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if ".lora." in n} == {torch.bfloat16}
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in expected.items())
    assert model(TOKENS).logits.dtype == torch.bfloat16


def test_routers_compute_in_float32_under_autocast() -> None:
    model = model_with("llama", MoeLoraConfig())
    routers = [module for name, module in model.named_modules() if name.endswith(".router.default")]
    types = set()
    for router in routers:
        router.register_forward_hook(lambda module, args, output: types.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(TOKENS)
    assert types == {torch.float32}


def test_dropout_is_for_the_experts_in_training_only() -> None:
    model = model_with("llama", MoeLoraConfig(lora_dropout=0.5))
    calm = model(TOKENS).logits
    assert torch.equal(model(TOKENS).logits, calm)
    model.train()
    assert not torch.allclose(model(TOKENS).logits, calm, atol=1e-2)


def task_model() -> PeftModel:
    return model_with("llama", METHODS["moelora-task"].config())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputed_block_sees_the_tasks_of_its_own_forward(use_reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = task_model().train()
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        first = model(input_ids=TOKENS, labels=TOKENS, task_ids=[0, 1]).loss
        second = model(input_ids=TOKENS, labels=TOKENS, task_ids=[2, 2]).loss
        (first + 2 * second).backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for actual, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_tasks_can_be_put_in_force() -> None:
    model = task_model()
    expected = model(input_ids=TOKENS, task_ids=torch.tensor([1, 2])).logits
    with model.use_tasks([1, 2]):
        assert torch.equal(model(TOKENS).logits, expected)
        assert torch.equal(model.get_base_model()(TOKENS).logits, expected)
    assert not torch.allclose(model(input_ids=TOKENS, task_ids=[0, 0]).logits, expected, atol=1e-2)


@pytest.mark.parametrize(
    ("task_ids", "message"),
    [
        (None, "pass task_ids"),
        ([0, 3], "between 0 and 2"),
        ([-1, 0], "between 0 and 2"),
        ([0, 1, 2], "3 rows; the batch has 2"),
        ([0.0, 1.0], "whole numbers"),
        ([[0, 1]], "whole numbers"),
    ],
)
def test_tasks_that_cannot_be(task_ids: Any, message: str) -> None:
    model = task_model()
    with pytest.raises(MiLoraError, match=message):
        model(input_ids=TOKENS, task_ids=task_ids)
    with pytest.raises(MiLoraError, match=message):
        model.generate(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=2, task_ids=task_ids)


def test_tasks_without_a_task_gate() -> None:
    model = model_with("llama", MoeLoraConfig())
    with pytest.raises(MiLoraError, match="gate='task'"):
        model(input_ids=TOKENS, task_ids=[0, 1])


def test_adapters_of_both_gates_on_one_backbone() -> None:
    model = task_model()
    expected = model(input_ids=TOKENS, task_ids=[0, 1]).logits
    model.add_adapter("token", METHODS["moelora"].config())
    model.set_adapter("token")
    randomize(model, "moelora")
    by_token = model(TOKENS).logits
    assert torch.equal(by_token, model(TOKENS).logits)
    model.set_adapter("default")
    assert torch.equal(model(input_ids=TOKENS, task_ids=[0, 1]).logits, expected)
    with pytest.warns(UserWarning, match="active adapter to token"):
        model.delete_adapter("default")
    assert model.active_adapters == ["token"]
    assert torch.equal(model(TOKENS).logits, by_token)


@pytest.mark.filterwarnings("ignore:Adapter default was active:UserWarning")
def test_layers_agree_on_what_follows_a_deleted_adapter() -> None:
    model = get_peft_model(ARCHITECTURES["llama"](), BitFitConfig())
    model.add_adapter("on_q", BitFitConfig(target_modules=["q_proj"]))
    model.add_adapter("on_k", BitFitConfig(target_modules=["k_proj"]))
    model.delete_adapter("default")
    assert model.active_adapters == ["on_q"] or model.active_adapters == ["on_k"]
    assert {tuple(layer.active_adapters) for layer in model.base_model.layers().values()} == {
        tuple(model.active_adapters)
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate": "prompt"}, "Unknown gate"),
        ({"r": 30}, "multiple of num_experts"),
        ({"top_k": 9}, "between 1 and num_experts"),
        ({"top_k": 0}, "between 1 and num_experts"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"gate": "task"}, "num_tasks"),
        ({"gate": "task", "num_tasks": 2, "task_embedding_dim": 0}, "task_embedding_dim"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MiLoraError, match=message):
        MoeLoraConfig(**settings)


def test_a_router_needs_something_to_read() -> None:
    with pytest.raises(MiLoraError, match=r"mlp.down_proj.*Adapt one of .*mlp.up_proj"):
        get_peft_model(ARCHITECTURES["llama"](), MoeLoraConfig(target_modules=["down_proj"]))
    model = get_peft_model(ARCHITECTURES["gpt2"](), MoeLoraConfig(target_modules="all-linear"))
    assert len(model.peft_config["default"].modules) == 4


def test_modules_that_are_called_out_of_order() -> None:
    model = model_with("llama", MoeLoraConfig(target_modules=["down_proj", "up_proj"]))
    down = model.get_base_model().get_submodule("model.layers.0.mlp.down_proj")
    with pytest.raises(RuntimeError, match=r"layers.0.mlp.down_proj was called directly"):
        down(torch.zeros(1, 1, 48))


# ------------------------------------------------------------------------------------------------------- the paper


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # Per module 32 (d_in + d_out), and a router of 8 d.
        (lambda: MoeLoraConfig(), 87_293_952),
        # Per module a vector of 64, and its projection.
        (lambda: BitFitConfig(), 87_046_144),
        # 78,643,200 for the projections, plus the vectors.
        (lambda: IA3ProjectedConfig(), 78_643_200 + 32 * 3 * 128),
    ],
    ids=["moelora", "bitfit", "ia3"],
)
def test_parameters_on_llama_2_7b(config: Any, expected: int) -> None:
    model = get_peft_model(build("llama-2-7b"), config(), low_cpu_mem_usage=True)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
