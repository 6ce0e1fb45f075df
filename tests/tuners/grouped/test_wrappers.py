"""Whole modules and tokens that adapters save besides LoRA: each row uses its adapter's own."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import AuxiliaryTrainingWrapper
from support.adapted import ALL_ARCHITECTURES, assert_nothing_in_force
from support.architectures import pad, random_prompts
from torch import Tensor
from transformers import CompileConfig

from milora import MiLoraConfig, MiLoraError
from milora.inference.together import serve_together
from milora.tuners.generate_options import ALL_DEVICES

INPUT_IDS, ATTENTION_MASK = pad(random_prompts(5, (3, 9), seed=11), "left")
BATCH = {"input_ids": INPUT_IDS, "attention_mask": ATTENTION_MASK}
NAMES = ["one", "two", "__base__", "bare", "two"]
HEADS: list[dict[str, Any]] = [{"modules_to_save": ["lm_head"]}] * 2
TOKENS: list[dict[str, Any]] = [{"trainable_token_indices": sorted(set(INPUT_IDS[row].tolist()))} for row in (0, 1)]
NORMS: list[dict[str, Any]] = [{"modules_to_save": ["norm"]}] * 2
KINDS = {"lm_head": HEADS, "tokens": TOKENS, "norm": NORMS}


def tenants(method: type[Any], extras: list[dict[str, Any]], *, first: str = "one") -> PeftModel:
    """Two adapters with saved modules or tokens, and one without."""
    fields: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    fields |= {"task_type": "CAUSAL_LM"} if method is LoraConfig else {"top_k": 1}
    configs = {
        name: method(**fields, **extra) for name, extra in zip(("one", "two", "bare"), [*extras, {}], strict=True)
    }
    torch.manual_seed(3)
    model = get_peft_model(ALL_ARCHITECTURES["llama"](), configs.pop(first), adapter_name=first)
    for name, config in configs.items():
        model.add_adapter(name, config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "modules_to_save" in path or "trainable_tokens_delta" in path:
                parameter.normal_()
    if method is LoraConfig:
        serve_together(model)
    model.set_adapter(first)
    return model.eval()


@torch.no_grad()
def logits_of(model: PeftModel, rows: Any = slice(None), **settings: Any) -> Tensor:
    return model(**{name: tensor[rows] for name, tensor in BATCH.items()}, **settings).logits


def generate(model: PeftModel, rows: Any = slice(None), **settings: Any) -> list[list[int]]:
    inputs = {name: tensor[rows] for name, tensor in BATCH.items()}
    settings = {"max_new_tokens": 4, "do_sample": False, **settings}
    return model.generate(**inputs, **settings)[:, INPUT_IDS.shape[1] :].tolist()


def alone(model: PeftModel, function: Any, **settings: Any) -> list[Any]:
    found = []
    for row, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                found += function(model, [row], **settings)
        else:
            active = model.active_adapter
            model.set_adapter(name)
            found += function(model, [row], **settings)
            model.set_adapter(active)
    return found


@pytest.mark.parametrize("first", ["one", "bare"])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("method", [MiLoraConfig, LoraConfig])
def test_each_row_is_as_if_alone(method: type[Any], kind: str, first: str) -> None:
    model = tenants(method, KINDS[kind], first=first)
    assert any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules())
    expected = alone(model, logits_of)
    found = logits_of(model, adapter_names=NAMES)
    for row, logits in enumerate(expected):
        torch.testing.assert_close(found[row], logits, rtol=1e-4, atol=1e-5)
    assert generate(model, adapter_names=NAMES) == alone(model, generate)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_beams() -> None:
    model = tenants(MiLoraConfig, HEADS)
    assert generate(model, adapter_names=NAMES, num_beams=2) == alone(model, generate, num_beams=2)


def test_gradients_reach_each_rows_own_head() -> None:
    model = tenants(MiLoraConfig, HEADS)
    heads = model.base_model.model.lm_head.modules_to_save
    heads.requires_grad_(True)
    model(**BATCH, adapter_names=["two"] * 4 + ["__base__"]).logits.sum().backward()
    assert heads["two"].weight.grad.any()
    assert heads["one"].weight.grad is None


class TestCompiledSteps:
    """Compiled steps read from fixed buffers; for saved modules they would use one adapter for all rows."""

    @staticmethod
    def config() -> CompileConfig:
        own = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
        setattr(own, ALL_DEVICES, True)
        return own

    def test_milora_refuses_them(self) -> None:
        model = tenants(MiLoraConfig, HEADS)
        with pytest.raises(MiLoraError, match=r"lm_head cannot be part of a compiled decode step.*modules_to_save"):
            generate(model, adapter_names=NAMES, compiled=True)
        assert_nothing_in_force(model)

    def test_milora_runs_them_eagerly_where_nobody_asked(self) -> None:
        model = tenants(MiLoraConfig, HEADS)
        static = {"adapter_names": NAMES, "cache_implementation": "static"}
        own = CompileConfig(backend=lambda graph, inputs: pytest.fail("a step was compiled"), mode=None)
        setattr(own, ALL_DEVICES, True)
        assert generate(model, compile_config=own, **static) == alone(model, generate)

    @pytest.mark.slow
    def test_one_adapter_for_all_rows_is_compiled(self) -> None:
        torch._dynamo.reset()
        model = tenants(MiLoraConfig, HEADS)
        expected = generate(model)
        model.set_adapter("two")
        others = generate(model)
        settings = {"compiled": True, "compile_config": self.config()}
        assert generate(model, **settings) == others != expected
        model.set_adapter("one")
        assert generate(model, **settings) == expected

    @pytest.mark.slow
    def test_plain_lora_goes_pefts_way(self) -> None:
        torch._dynamo.reset()
        model = tenants(LoraConfig, HEADS)
        expected = generate(model, adapter_names=["one", "two", "two", "one", "two"])
        settings = {"cache_implementation": "static", "compile_config": self.config()}
        assert generate(model, adapter_names=["one", "two", "two", "one", "two"], **settings) == expected
