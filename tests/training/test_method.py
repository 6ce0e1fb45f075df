"""The method to train and its settings: names, flags and mappings."""

from __future__ import annotations

from typing import Any

import pytest
from support.architectures import ARCHITECTURES

from milora import MiLoraConfig, MiLoraError
from milora.methods import METHODS
from milora.training import DataArguments, MethodArguments


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_configuration(name: str) -> None:
    config = MethodArguments(name).to_config(ARCHITECTURES["llama"](), steps=100)
    assert type(config) is METHODS[name].config_class
    if name == "adalora":
        assert (config.total_step, config.tinit, config.tfinal) == (100, 10, 30)


def test_the_papers_settings_are_the_defaults() -> None:
    config = MethodArguments().to_config(ARCHITECTURES["llama"](), steps=100)
    assert isinstance(config, MiLoraConfig)
    values = (config.r, config.lora_alpha, config.top_k, config.pooler, config.rational_orders, config.gate)
    assert values == (32, 64, 3, "attention", [6, 5], "hard")
    assert (config.load_balancing_coef, config.router_activation, config.use_dora) == (1e-2, "rational", False)


@pytest.mark.parametrize("name", ["milora", "midora"])
def test_routers_are_centered_unless_another_norm_is_given(name: str) -> None:
    backbone = ARCHITECTURES["llama"]()
    norms = [
        MethodArguments(name, **given).to_config(backbone, steps=1).router_norm  # type: ignore[arg-type, attr-defined]
        for given in ({}, {"router_norm": "tokens"}, {"settings": {"router_norm": "none"}})
    ]
    assert norms == ["centered", "tokens", "none"]


@pytest.mark.parametrize("settings", [{"num_experts": 4}, '{"num_experts": 4}'])
def test_settings_as_a_mapping_and_as_json(settings: Any) -> None:
    config = MethodArguments("moelora", settings, r=16).to_config(ARCHITECTURES["llama"](), steps=1)
    assert (config.num_experts, config.r, config.lora_alpha) == (4, 16, 32)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"method": "milrao"}, "There is no method 'milrao'.*did you mean 'milora'"),
        ({"method": "bitfit", "r": 4}, "--r is not a setting of bitfit: its BitFitConfig has no field 'r'"),
        ({"method": "lora", "pooler": "max"}, "--pooler is not a setting of lora"),
        ({"method": "adalora", "r": 4}, "set 'init_r'"),
        ({"settings": {"topk": 2}}, "'topk' is not a setting of milora.*did you mean 'top_k'"),
        ({"settings": "{r: 4"}, "settings is not JSON"),
        ({"settings": "[4]"}, "settings must be a mapping"),
        ({"method": "moelora", "settings": {"gate": "task", "num_tasks": 2}}, "needs each row's task"),
    ],
)
def test_mistakes(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(MiLoraError, match=complaint):
        MethodArguments(**values)


def test_a_field_that_is_given_twice() -> None:
    assert MethodArguments(settings={"r": 4}, r=4).overrides() == {"r": 4}
    with pytest.raises(MiLoraError, match="r is given twice: 8, and 4 in settings"):
        MethodArguments(settings={"r": 4}, r=8)


def test_a_value_that_peft_refuses() -> None:
    with pytest.raises(MiLoraError, match="settings of lora are refused"):
        MethodArguments("lora", {"layers_pattern": "layers"}).to_config(ARCHITECTURES["llama"](), steps=1)


def test_an_activation_for_each_half_of_the_blocks() -> None:
    from peft import get_peft_model

    config = MethodArguments(router_activation=["relu|gelu"]).to_config(ARCHITECTURES["llama"](), steps=1)
    model = get_peft_model(ARCHITECTURES["llama"](), config)
    assert model.peft_config["default"].router_activation == ["relu", "gelu"]
    routers = [module for name, module in model.named_modules() if name.endswith("milora_router.activation.default")]
    assert [router.name for router in routers] == ["relu", "gelu"]
    with pytest.raises(MiLoraError, match="3 parts, but there are 2 blocks"):
        get_peft_model(ARCHITECTURES["llama"](), MiLoraConfig(router_activation="relu|gelu|silu"))
    with pytest.raises(MiLoraError, match="Unknown router_activation 'gelo'"):
        MiLoraConfig(router_activation="relu|gelo")


def test_tasks_by_comma_and_by_space() -> None:
    data = DataArguments("tiny", task=["bundled-choice,bundled-yesno", "arc-easy"], data=["bundled-choice"])
    assert data.sources == ["bundled-choice", "bundled-yesno", "arc-easy"]
    assert DataArguments("tiny", task="boolq").task == ["boolq"]  # As YAML can contain it.
    with pytest.raises(MiLoraError, match=r"no task 'arc-esy'.*did you mean 'arc-easy'"):
        DataArguments("tiny", task=["arc-esy"])
