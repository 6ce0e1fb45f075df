from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners import tuners_utils
from peft.tuners.lora import LoraLayer
from support.architectures import ARCHITECTURES, EXPERTS, random_prompts

from milora import MiLoraConfig, MiLoraError, Route
from milora.tuners.milora.export import export_route


def adapted(family: str, **settings: Any) -> PeftModel:
    """A backbone with a random MiLoRA adapter, with any setting that LoRA shares."""
    model = get_peft_model(ARCHITECTURES[family](), MiLoraConfig(**{"r": 4, "lora_alpha": 8, "top_k": 2, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif "lora_" in name and "activation" not in name:
                parameter.normal_(std=1.0 if "router" in name else 0.3)
    return model.eval()


def check_equal(model: PeftModel, folder: Path, family: str, route: Route) -> PeftModel:
    """Checks that the exported adapter gives the frozen route's logits for any prompt, also when merged."""
    inputs = torch.tensor(random_prompts(3, 9, seed=7))
    with model.base_model.use_route(route):
        expected = model(input_ids=inputs).logits
    exported = PeftModel.from_pretrained(ARCHITECTURES[family](), folder).eval()
    with model.disable_adapter():
        assert not torch.allclose(model(input_ids=inputs).logits, expected, atol=1e-2)
    torch.testing.assert_close(exported(input_ids=inputs).logits, expected, atol=1e-5, rtol=1e-5)
    chosen = {f"{block}.{expert}" for block, experts in route.chosen_experts().items() for expert in experts}
    layers = {name for name, module in exported.base_model.model.named_modules() if isinstance(module, LoraLayer)}
    assert layers == chosen
    merged = exported.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=inputs).logits, expected, atol=1e-4, rtol=1e-4)
    return exported


def route_of(model: PeftModel, seed: int = 3) -> Route:
    return model.base_model.route(input_ids=torch.tensor(random_prompts(1, 8, seed=seed)))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"use_dora": True}),
        ("llama", {"gate": "softmax"}),
        ("llama", {"gate": "renormalized", "use_rslora": True}),
        ("llama", {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp.up_proj": 8}, "alpha_pattern": {"v_proj": 3}}),
        ("opt", {"lora_bias": True, "gate": "softmax"}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "top_k": 1}),
        ("gpt2", {}),
        ("gpt2", {"gate": "softmax"}),
        ("opt", {}),
    ],
)
def test_the_exported_adapter_equals_the_frozen_route(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(family, **settings)
    route = route_of(model)
    config = export_route(model, route, tmp_path / "lora")
    assert config.target_modules == list(dict.fromkeys(config.target_modules))
    check_equal(model, tmp_path / "lora", family, route)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lora"]


def test_so_many_modules_that_peft_shortens_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama", top_k=6)
    # From 20 entries on, PEFT shortens names to common endings, which must not match modules that were not chosen.
    monkeypatch.setattr(tuners_utils, "MIN_TARGET_MODULES_FOR_OPTIMIZATION", 2)
    route = route_of(model, seed=4)
    assert len({tuple(experts) for experts in route.chosen_experts().values()}) > 1
    export_route(model, route, tmp_path / "lora")
    exported = check_equal(model, tmp_path / "lora", "llama", route)
    assert len(exported.peft_config["default"].target_modules) < 12


def test_a_block_without_chosen_modules_is_left_out(tmp_path: Path) -> None:
    model = adapted("llama")
    route = route_of(model)
    gates = route.gates.clone()
    gates[0] = 0
    half = Route(gates, route.probabilities, route.experts, route.blocks)
    export_route(model, half, tmp_path / "lora")
    check_equal(model, tmp_path / "lora", "llama", half)
    nothing = Route(gates * 0, route.probabilities, route.experts, route.blocks)
    with pytest.raises(MiLoraError, match="no expert"):
        export_route(model, nothing, tmp_path / "other")


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    model = adapted("llama", use_dora=True, gate="softmax")
    route = route_of(model)
    with pytest.raises(MiLoraError, match="only with gates of 1, but this adapter has gate="):
        export_route(model, route, tmp_path / "lora")
    plain = adapted("llama")
    route = route_of(plain)
    with pytest.raises(MiLoraError, match="2 prompts"):
        export_route(plain, route.expand(2), tmp_path / "lora")
    with pytest.raises(MiLoraError, match="none of that name"):
        export_route(plain, route, tmp_path / "lora", "other")
    foreign = Route(route.gates, route.probabilities, (*EXPERTS["phi3"], "a", "b", "c"), route.blocks)
    with pytest.raises(MiLoraError, match="same adapter"):
        export_route(plain, foreign, tmp_path / "lora")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(MiLoraError, match="not an empty folder"):
        export_route(plain, route, tmp_path / "used")
    assert [file.name for file in tmp_path.iterdir()] == ["used"]
    assert isinstance(plain.peft_config["default"], MiLoraConfig)
