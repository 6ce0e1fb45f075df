"""Plain LoRA adapters of one PEFT model in one batch, against PEFT's own loop and each row alone."""

import copy
import pickle
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from support.adapted import ALL_ARCHITECTURES, adapted
from support.architectures import pad, random_prompts
from torch import Tensor, nn
from transformers import CompileConfig

from milora import MiLoraError
from milora.inference.together import NAMED_ROWS, compiled_step, serve_together
from milora.methods import config_for
from milora.tuners.generate_options import ALL_DEVICES
from milora.tuners.grouped import stacks as grouped_serving

PROMPTS = random_prompts(5, (3, 9), seed=8)
INPUT_IDS, ATTENTION_MASK = pad(PROMPTS, "left")
BATCH = {"input_ids": INPUT_IDS, "attention_mask": ATTENTION_MASK}
NAMES = ["one", "__base__", "two", "one", "three"]

QKV = {"gpt2": ["c_attn", "c_fc"], "opt": ["q_proj", "fc1", "fc2"]}


def tenants(name: str = "llama", **settings: Any) -> PeftModel:
    targets = QKV.get(name, ["q_proj", "v_proj", "down_proj"])
    fields = {"task_type": "CAUSAL_LM", "fan_in_fan_out": name == "gpt2", **settings}
    configs = {
        "one": LoraConfig(r=4, lora_alpha=8, target_modules=targets, **fields),
        "two": LoraConfig(r=2, lora_alpha=1, target_modules=targets[:1], **fields),
        "three": LoraConfig(r=7, lora_alpha=3, use_rslora=True, target_modules=targets[1:], **fields),
    }
    model = get_peft_model(ALL_ARCHITECTURES[name](), configs["one"], adapter_name="one")
    for adapter in ("two", "three"):
        model.add_adapter(adapter, configs[adapter])
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return model.eval()


@torch.no_grad()
def logits_of(model: nn.Module, **settings: Any) -> Tensor:
    return model(**BATCH, **settings).logits


def generate(model: nn.Module, **settings: Any) -> list[list[int]]:
    settings = {"max_new_tokens": 5, "do_sample": False, **settings}
    return model.generate(**BATCH, **settings)[:, INPUT_IDS.shape[1] :].tolist()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    rows: list[int] = []
    own = grouped_serving.add_grouped_lora

    def counted(result: Tensor, x: Tensor, *rest: Tensor) -> Tensor:
        rows.append(x.shape[0])
        return own(result, x, *rest)

    monkeypatch.setattr(grouped_serving, "add_grouped_lora", counted)
    return rows


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_logits_are_those_of_pefts_loop(name: str, calls: list[int]) -> None:
    model = tenants(name)
    expected = logits_of(model, adapter_names=NAMES)
    assert not calls
    serve_together(model)
    torch.testing.assert_close(logits_of(model, adapter_names=NAMES), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == sum(isinstance(module, LoraLayer) for module in model.modules())


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_generated_rows_are_those_of_pefts_loop(settings: dict[str, Any]) -> None:
    model = tenants()
    expected = generate(model, adapter_names=NAMES, **settings)
    serve_together(model)
    serve_together(model)
    assert generate(model, adapter_names=NAMES, **settings) == expected
    assert generate(model, adapter_names=NAMES[::-1], **settings) != expected
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_several_return_sequences() -> None:
    model = tenants()
    serve_together(model)
    beams = {"num_beams": 4, "num_return_sequences": 2}
    expected = []
    for row, adapter in enumerate(NAMES):
        inputs = {name: tensor[row : row + 1] for name, tensor in BATCH.items()}
        names = {"adapter_names": [adapter]}
        expected += model.generate(**inputs, **beams, **names, max_new_tokens=4)[:, INPUT_IDS.shape[1] :].tolist()
    assert (
        model.generate(**BATCH, **beams, adapter_names=NAMES, max_new_tokens=4)[:, INPUT_IDS.shape[1] :].tolist()
        == expected
    )


def test_flattened_tokens_belong_to_their_rows() -> None:
    # OPT's feed-forward modules get (batch * tokens, d), which PEFT's loop rejects.
    model = tenants("opt")
    serve_together(model)
    mixed = logits_of(model, adapter_names=NAMES)
    for row, adapter in enumerate(NAMES):
        if adapter == "__base__":
            with model.disable_adapter():
                expected = logits_of(model)[row]
        else:
            model.set_adapter(adapter)
            expected = logits_of(model)[row]
        torch.testing.assert_close(mixed[row], expected, rtol=1e-4, atol=1e-5)


def test_one_adapter_for_all_is_pefts_own() -> None:
    model = tenants()
    expected = generate(model)
    serve_together(model)
    assert generate(model) == expected


def test_dora_goes_pefts_way() -> None:
    model = tenants()
    model.add_adapter("dora", LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    serve_together(model.eval())
    with pytest.raises(ValueError, match="DoRA"):
        logits_of(model, adapter_names=["dora", *NAMES[1:]])
    assert logits_of(model, adapter_names=NAMES).isfinite().all()


class TestStepsThatTransformersCompiles:
    """Simulates a GPU, where transformers compiles as soon as the cache is static."""

    OPTIONS: ClassVar = {"cache_implementation": "static"}

    @staticmethod
    def config() -> CompileConfig:
        own = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
        setattr(own, ALL_DEVICES, True)
        return own

    @pytest.mark.slow
    def test_what_the_operator_does_not_serve_goes_pefts_way(self) -> None:
        torch._dynamo.reset()
        model = tenants("gpt2", lora_bias=True)
        names = ["one", "two", "__base__", "one", "three"]
        expected = generate(model, adapter_names=names)
        serve_together(model)
        assert model.base_model.owner.why_not_compiled() is not None
        assert generate(model, adapter_names=names, compile_config=self.config(), **self.OPTIONS) == expected

    @pytest.mark.slow
    def test_an_adapter_that_is_not_in_the_batch_rules_nothing_out(self) -> None:
        torch._dynamo.reset()
        model = tenants()
        expected = generate(model, adapter_names=NAMES)
        dora = LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model.add_adapter("dora", dora)
        serve_together(model.eval())
        assert generate(model, adapter_names=NAMES, compile_config=self.config(), **self.OPTIONS) == expected
        assert model.base_model.owner.stacks
        with pytest.raises(ValueError, match="DoRA"):
            generate(model, adapter_names=["dora"] * 5, compile_config=self.config(), **self.OPTIONS)

    def test_beside_another_compiled_generation(self) -> None:
        model = tenants()
        serve_together(model)
        with (
            model.base_model.owner.alone(),
            pytest.raises(MiLoraError, match=r"Another compiled generation is running.*disable_compile=True"),
        ):
            generate(model, adapter_names=NAMES, compile_config=self.config(), **self.OPTIONS)
        options = {**self.OPTIONS, "disable_compile": True}
        with model.base_model.owner.alone():
            assert generate(model, adapter_names=NAMES, **options) == generate(model, adapter_names=NAMES)


def test_trained_further_after_serving() -> None:
    model = tenants()
    serve_together(model)
    before = logits_of(model, adapter_names=NAMES)
    model.set_adapter("two")
    model(**BATCH, labels=INPUT_IDS).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad
    after = logits_of(model, adapter_names=NAMES)
    assert torch.equal(after[[0, 1, 3, 4]], before[[0, 1, 3, 4]])
    torch.testing.assert_close(after[2], logits_of(model)[2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after[2], before[2])


def test_copies_serve_too() -> None:
    model = tenants()
    serve_together(model)
    expected = generate(model, adapter_names=NAMES)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert generate(twin, adapter_names=NAMES) == expected
        for parameter in twin.parameters():
            parameter.data.zero_()
        assert generate(model, adapter_names=NAMES) == expected


@pytest.mark.usefixtures("either_way")
def test_bfloat16_backbone_with_float32_adapters() -> None:
    model = tenants()
    model.base_model.model.to(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_A.float()
            module.lora_B.float()
    expected = logits_of(model, adapter_names=NAMES)
    serve_together(model)
    torch.testing.assert_close(logits_of(model, adapter_names=NAMES), expected, rtol=5e-2, atol=5e-2)


def test_bad_names() -> None:
    model = tenants()
    serve_together(model)
    with pytest.raises(MiLoraError, match=r"No adapter named 'tow'.*did you mean 'two'"):
        logits_of(model, adapter_names=["tow"] * 5)
    with pytest.raises(MiLoraError, match="names 2 rows; the batch has 5"):
        logits_of(model, adapter_names=["two"] * 2)
    with pytest.raises(MiLoraError, match="empty"):
        logits_of(model, adapter_names=[])
    with pytest.raises(MiLoraError, match=r"model\.eval\(\)"):
        logits_of(model.train(), adapter_names=NAMES)


def test_models_that_it_is_not_for() -> None:
    with pytest.raises(MiLoraError, match="found LlamaForCausalLM"):
        serve_together(ALL_ARCHITECTURES["llama"]())
    backbone = ALL_ARCHITECTURES["llama"]()
    with pytest.raises(MiLoraError, match="serve_together needs a PEFT model with LoRA or MiLoRA adapters"):
        serve_together(get_peft_model(backbone, config_for("bitfit", backbone)))


def test_a_milora_model_is_given_its_capacity() -> None:
    model = adapted().model
    serve_together(model, capacity=3)
    assert generate(model, adapter_names=["default"] * 5) == generate(model)
    stack = next(iter(model.base_model.owner.stacks.values()))
    assert stack.lora_a.shape[0] == 3


def test_pefts_method_is_where_it_was() -> None:
    assert callable(getattr(type(tenants().base_model), NAMED_ROWS))


@pytest.mark.slow
def test_compiled_once_for_all_tenants() -> None:
    counts = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counts.clear()
    model = tenants()
    serve_together(model, capacity=4)
    options = compiled_step(compile_config=CompileConfig(fullgraph=True, backend="aot_eager", mode=None))
    orders = (NAMES, NAMES[::-1], ["two"] * 5)
    expected = [generate(model, adapter_names=names, cache_implementation="static") for names in orders]
    for names, tokens in zip(orders, expected, strict=True):
        assert generate(model, adapter_names=names, **options) == tokens
    model.add_adapter("four", LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    names = ["four", *NAMES[1:]]
    tokens = generate(model.eval(), adapter_names=names, cache_implementation="static")
    assert generate(model, adapter_names=names, **options) == tokens
    assert counts["stats"]["unique_graphs"] == 1
    assert not counts["graph_break"]
