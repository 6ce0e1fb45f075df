"""Adapters managed by PEFT: several in one model, switched, saved, loaded, removed; and LoRA's options."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraLayer
from peft.utils.peft_types import PeftType
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.adapted import ALL_ARCHITECTURES, Snapshot, adapted, add_adapter, perturbed, saved
from support.architectures import ARCHITECTURES, BLOCKS, EXPERTS, HIDDEN, UNEVEN_EXPERTS, pad, random_prompts
from support.reference import weight_of
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaForTokenClassification, LogitsProcessor

from milora import MiLoraConfig, MiLoraError, MiLoraModel
from milora.tuners.milora.router import RouterLayer, routers_of
from milora.tuners.registry import register

PROMPTS = random_prompts(4, (3, 9), seed=1)
INPUT_IDS, ATTENTION_MASK = pad(PROMPTS, "left")
BATCH = {"input_ids": INPUT_IDS, "attention_mask": ATTENTION_MASK}


@torch.no_grad()
def logits_of(model: nn.Module, **settings: Any) -> Tensor:
    return model(**BATCH, **settings).logits


def generate(model: nn.Module, rows: slice = slice(None), **settings: Any) -> list[list[int]]:
    inputs = {name: tensor[rows] for name, tensor in BATCH.items()}
    settings = {"max_new_tokens": 6, "do_sample": False, **settings}
    return model.generate(**inputs, **settings)[:, INPUT_IDS.shape[1] :].tolist()


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def two_adapters(name: str = "llama") -> PeftModel:
    model = adapted(name).model
    add_adapter(model, "other", name, seed=7, top_k=3)
    return model


class TestSeveral:
    def test_each_adapter_is_its_own(self) -> None:
        case = adapted()
        alone = generate(case.model)
        other = add_adapter(case.model, "other", seed=7, top_k=3, pooler="max", gate="softmax")
        assert generate(case.model) == alone
        case.model.set_adapter("other")
        expected = [other.greedy(torch.tensor([prompt]), 6) for prompt in PROMPTS]
        assert generate(case.model) == expected
        assert expected != alone
        route = case.model.route(**BATCH)
        for row, prompt in enumerate(PROMPTS):
            assert torch.equal(route.chosen[:, row], other.route(torch.tensor([prompt])).gates > 0)
        case.model.set_adapter("default")
        assert generate(case.model) == alone

    def test_set_adapter_says_what_trains(self) -> None:
        model = two_adapters()
        model.set_adapter("other")
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {name for name in model.state_dict() if ".other" in name}
        assert any("milora_router" in name for name in trained)
        model.set_adapter("default", inference_mode=True)
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_other_experts(self) -> None:
        case = adapted()
        config = MiLoraConfig(r=2, top_k=1, target_modules=["q_proj", "down_proj"], layers_to_transform=[1])
        case.model.add_adapter("narrow", config)
        assert config.experts == {"model.layers.1": ["self_attn.q_proj", "mlp.down_proj"]}
        assert generate(case.model) == [case.reference.greedy(torch.tensor([prompt]), 6) for prompt in PROMPTS]
        case.model.set_adapter("narrow")
        assert case.model.route(**BATCH).blocks == ("model.layers.1",)
        # The new adapter has no effect, because LoRA's B starts at zero.
        with case.model.disable_adapter():
            backbone = generate(case.model)
        assert generate(case.model) == backbone

    def test_delete_another(self) -> None:
        model = two_adapters()
        before = generate(model)
        model.delete_adapter("other")
        assert generate(model) == before
        assert not [name for name in model.state_dict() if ".other" in name]
        model.add_adapter("other", MiLoraConfig(r=2))

    @pytest.mark.filterwarnings("ignore:Adapter default was active:UserWarning")
    def test_delete_the_active_one(self) -> None:
        model = two_adapters()
        model.set_adapter("other")
        expected = generate(model)
        model.set_adapter("default")
        model.delete_adapter("default")
        assert model.active_adapter == "other"
        assert model.active_adapters == ["other"]
        assert generate(model) == expected
        assert [router.active_adapters for router in routers_of(model).values()] == [["other"]] * 2

    def test_delete_the_last(self) -> None:
        model = adapted().model
        backbone = generate(ARCHITECTURES["llama"]())
        model.delete_adapter("default")
        # PEFT's own wrapper would look up the deleted adapter's configuration.
        assert generate(model.base_model) == backbone
        assert not [module for module in model.modules() if isinstance(module, RouterLayer)]
        with pytest.raises(MiLoraError, match="there are no routers"):
            model.route(**BATCH)
        model.add_adapter("new", MiLoraConfig(r=2, init_lora_weights=False))
        model.set_adapter("new")
        assert generate(model) != backbone

    @pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "lfm2"])
    def test_disabled_is_the_backbone_bit_for_bit(self, name: str) -> None:
        backbone, model = ALL_ARCHITECTURES[name](), adapted(name, use_dora=True).model
        before = logits_of(model)
        with model.disable_adapter():
            assert torch.equal(logits_of(model), logits_of(backbone))
            assert generate(model) == generate(backbone)
            with pytest.raises(MiLoraError, match="disabled"):
                model.route(**BATCH)
        assert torch.equal(logits_of(model), before)

    def test_an_unchosen_module_is_the_backbones_bit_for_bit(self) -> None:
        model = adapted(top_k=1).model
        route = model.route(**BATCH)
        none = type(route)(torch.zeros_like(route.gates), route.probabilities, route.experts, route.blocks)
        with model.use_route(none):
            assert torch.equal(logits_of(model), logits_of(ARCHITECTURES["llama"]()))


class TestAdapterNames:
    names = ("default", "other", "__base__", "other")

    def rows_alone(self, model: PeftModel, **settings: Any) -> list[list[int]]:
        found = []
        for row, name in enumerate(self.names):
            rows = slice(row, row + 1)
            if name == "__base__":
                with model.disable_adapter():
                    found += generate(model, rows, **settings)
            else:
                model.set_adapter(name)
                found += generate(model, rows, **settings)
        model.set_adapter("default")
        return found

    @pytest.mark.parametrize("name", ["llama", "gpt2", "lfm2", "gemma2"])
    def test_each_row_its_own(self, name: str) -> None:
        model = two_adapters(name)
        assert generate(model, adapter_names=list(self.names)) == self.rows_alone(model)

    @pytest.mark.parametrize(
        "settings",
        [
            {"num_beams": 3},
            {"num_beams": 3, "num_return_sequences": 2},
            {"cache_implementation": "static"},
            {"use_cache": False},
        ],
        ids=str,
    )
    def test_ways_to_decode(self, settings: dict[str, Any]) -> None:
        model = two_adapters()
        assert generate(model, adapter_names=list(self.names), **settings) == self.rows_alone(model, **settings)

    def test_return_sequences_sampled(self) -> None:
        model = two_adapters()
        found = []
        for settings in ({"adapter_names": ["other"] * 4}, {}):
            model.set_adapter("default" if settings else "other")
            torch.manual_seed(3)
            found.append(generate(model, do_sample=True, num_return_sequences=3, **settings))
        assert found[0] == found[1]
        assert len({tuple(row) for row in found[0]}) > 4

    def test_logits_of_a_forward(self) -> None:
        model = two_adapters()
        mixed = logits_of(model, adapter_names=list(self.names))
        with model.disable_adapter():
            torch.testing.assert_close(mixed[2], logits_of(model)[2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mixed[0], logits_of(model)[0], rtol=1e-4, atol=1e-5)
        model.set_adapter("other")
        torch.testing.assert_close(mixed[[1, 3]], logits_of(model)[[1, 3]], rtol=1e-4, atol=1e-5)

    def test_routes(self) -> None:
        model = two_adapters()
        route = model.route(**BATCH, adapter_names=list(self.names))
        assert not route.gates[:, 2].any()
        assert (route.chosen.sum(dim=-1) == torch.tensor([2, 3, 0, 3])).all()
        assert generate(model, adapter_names=list(self.names), route=route) == generate(
            model, adapter_names=list(self.names)
        )

    def test_prompt_lookup_keeps_each_rows_adapter(self) -> None:
        model = two_adapters()
        settings = {"adapter_names": ["other"], "rows": slice(0, 1), "max_new_tokens": 10}
        assert generate(model, prompt_lookup_num_tokens=3, **settings) == generate(model, **settings)

    def test_chunked_prefill_keeps_each_rows_adapter(self) -> None:
        model = two_adapters()
        settings = {"adapter_names": list(self.names)}
        assert generate(model, prefill_chunk_size=3, **settings) == generate(model, **settings)

    def test_an_exception_leaves_no_hooks(self) -> None:
        class Failing(LogitsProcessor):
            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                raise RuntimeError("interrupted")

        model = two_adapters()
        hooks, before = hooks_of(model), generate(model)
        with pytest.raises(RuntimeError, match="interrupted"):
            generate(model, adapter_names=list(self.names), logits_processor=[Failing()])
        assert hooks_of(model) == hooks
        assert generate(model) == before

    def test_flattened_tokens_belong_to_their_rows(self) -> None:
        # OPT's feed-forward modules get (batch * tokens, d).
        model = two_adapters("opt")
        mixed = logits_of(model, adapter_names=list(self.names))
        for row, name in enumerate(self.names):
            if name == "__base__":
                with model.disable_adapter():
                    alone = logits_of(model)
            else:
                model.set_adapter(name)
                alone = logits_of(model)
            torch.testing.assert_close(mixed[row], alone[row], rtol=1e-4, atol=1e-5)


class TestRemoval:
    @pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "afmoe", "lfm2"])
    def test_unload_gives_back_the_bare_backbone(self, name: str) -> None:
        backbone, model = ALL_ARCHITECTURES[name](), two_adapters(name)
        bare = model.unload()
        assert type(bare) is type(backbone)
        Snapshot(backbone.requires_grad_(False)).assert_unchanged(bare)
        assert torch.equal(logits_of(bare), logits_of(backbone))
        # The backbone can be adapted again.
        assert get_peft_model(bare, MiLoraConfig(r=2)).route(**BATCH)


class TestFiles:
    @pytest.mark.parametrize(
        ("name", "use_dora", "low_cpu_mem_usage"),
        [
            *((name, False, False) for name in ("gpt2", "lfm2", "deepseek_v3", "afmoe", "mixtral", "qwen2_moe")),
            *(("llama", use_dora, low) for use_dora in (False, True) for low in (False, True)),
            ("gpt2", True, True),
            ("lfm2", False, True),
        ],
    )
    def test_a_saved_adapter_gives_the_same_logits(
        self, name: str, use_dora: bool, low_cpu_mem_usage: bool, tmp_path: Path
    ) -> None:
        model = adapted(name, use_dora=use_dora, gate="softmax").model
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(ALL_ARCHITECTURES[name](), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits_of(loaded), logits_of(model))
        assert loaded.route(**BATCH) == model.route(**BATCH)
        assert not any(parameter.requires_grad or parameter.is_meta for parameter in loaded.parameters())

    # Names that also occur in every parameter's path, in LoRA's names, or in the router's.
    @pytest.mark.parametrize(
        ("adapter", "low_cpu_mem_usage"),
        [("other", False), ("model", False), ("model", True), ("lora_A_", False), ("projection", True)],
    )
    def test_as_second_adapter_under_another_name(self, adapter: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
        source = adapted(seed=7, use_dora=True).model
        source.save_pretrained(tmp_path)
        model = adapted().model
        first = logits_of(model)
        model.load_adapter(tmp_path, adapter, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits_of(model), first)
        model.set_adapter(adapter)
        assert torch.equal(logits_of(model), logits_of(source))
        model.save_pretrained(tmp_path / "again", selected_adapters=[adapter])
        again = PeftModel.from_pretrained(ARCHITECTURES["llama"](), tmp_path / "again" / adapter, adapter)
        assert torch.equal(logits_of(again), logits_of(source))

    def test_to_be_trained_further(self, tmp_path: Path) -> None:
        loaded = PeftModel.from_pretrained(ARCHITECTURES["llama"](), saved(tmp_path), is_trainable=True)
        assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == {
            name for name in loaded.state_dict() if ".default" in name
        }

    def test_weights_can_be_loaded_again_in_place(self, tmp_path: Path) -> None:
        model = adapted().model
        model.save_pretrained(tmp_path)
        before = logits_of(model)
        for name, parameter in model.named_parameters():
            if ".default" in name:
                parameter.data.zero_()
        model.load_adapter(tmp_path, "default")
        assert torch.equal(logits_of(model), before)

    @pytest.mark.parametrize("use_dora", [False, True], ids=["milora", "midora"])
    @pytest.mark.parametrize("pooler", ["attention", "mean"])
    def test_the_contract_of_the_tensors(self, pooler: str, use_dora: bool, tmp_path: Path) -> None:
        saved(tmp_path, pooler=pooler, use_dora=use_dora)
        expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        backbone = ARCHITECTURES["llama"]()
        for block in ("model.layers.0", "model.layers.1"):
            prefix = f"base_model.model.{block}."
            for expert in EXPERTS["llama"]:
                weight = backbone.get_submodule(f"{block}.{expert}").weight
                expected[f"{prefix}{expert}.lora_A.weight"] = ((4, weight.shape[1]), torch.float32)
                expected[f"{prefix}{expert}.lora_B.weight"] = ((weight.shape[0], 4), torch.float32)
                if use_dora:
                    expected[f"{prefix}{expert}.lora_magnitude_vector"] = ((weight.shape[0],), torch.float32)
            router = f"{prefix}milora_router."
            expected[f"{router}projection.weight"] = ((7, HIDDEN), torch.float32)
            if pooler == "attention":
                expected[f"{router}pooler.weight"] = ((1, HIDDEN), torch.float32)
            expected[f"{router}activation.numerator"] = ((7,), torch.float32)
            expected[f"{router}activation.denominator"] = ((5,), torch.float32)
        with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
            found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in _tensors(file).items()}
        assert found == expected
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        ]

    def test_the_contract_of_the_configuration(self, tmp_path: Path) -> None:
        get_peft_model(ARCHITECTURES["llama"](), MiLoraConfig(r=5)).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        expected = {
            "peft_type": "MILORA",
            "r": 5,
            "lora_alpha": 10,
            "top_k": 3,
            "pooler": "attention",
            "router_activation": "rational",
            "rational_orders": [6, 5],
            "gate": "hard",
            "router_norm": "tokens",
            "load_balancing_coef": 0.01,
            "experts": EXPERTS["llama"],
            "use_dora": False,
        }
        assert {key: config[key] for key in expected} == expected
        # Fields that are only used while the model is built are not saved.
        assert not {"expert_places", "awaits_weights", "normalize_router_input"} & set(config)

    @pytest.mark.parametrize(
        ("written", "router_norm"),
        [
            ({}, "none"),
            ({"normalize_router_input": False}, "none"),
            ({"normalize_router_input": True}, "pooled"),
            ({"router_norm": "tokens"}, "tokens"),
        ],
        ids=str,
    )
    def test_files_from_before_router_norm_route_as_they_were_trained(
        self, written: dict[str, Any], router_norm: str, tmp_path: Path
    ) -> None:
        model = adapted(router_norm=router_norm).model
        model.save_pretrained(tmp_path)
        path = tmp_path / "adapter_config.json"
        config = json.loads(path.read_text())
        del config["router_norm"]
        path.write_text(json.dumps(config | written))
        assert PeftConfig.from_pretrained(str(tmp_path)).router_norm == router_norm
        loaded = PeftModel.from_pretrained(ARCHITECTURES["llama"](), tmp_path)
        assert torch.equal(logits_of(loaded), logits_of(model))
        # Saving again writes the current format.
        loaded.save_pretrained(tmp_path)
        again = json.loads(path.read_text())
        assert again["router_norm"] == router_norm
        assert "normalize_router_input" not in again

    @pytest.mark.parametrize("name", UNEVEN_EXPERTS)
    def test_uneven_blocks_are_a_mapping(self, name: str, tmp_path: Path) -> None:
        saved(tmp_path, name)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["experts"] == UNEVEN_EXPERTS[name]

    def test_an_adapter_in_bfloat16_keeps_its_router_in_float32(self, tmp_path: Path) -> None:
        model = get_peft_model(ARCHITECTURES["llama"]().bfloat16(), MiLoraConfig(r=2), autocast_adapter_dtype=False)
        model.save_pretrained(tmp_path)
        with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
            for name, tensor in _tensors(file).items():
                assert tensor.dtype == (torch.float32 if "milora_router" in name else torch.bfloat16), name
        for low_cpu_mem_usage in (False, True):
            loaded = PeftModel.from_pretrained(
                ARCHITECTURES["llama"]().bfloat16(),
                tmp_path,
                autocast_adapter_dtype=False,
                low_cpu_mem_usage=low_cpu_mem_usage,
            )
            assert torch.equal(logits_of(loaded), logits_of(model.eval()))

    def test_the_sources_config_can_be_used_for_a_new_adapter(self, tmp_path: Path) -> None:
        config = MiLoraConfig.from_pretrained(saved(tmp_path))
        model = get_peft_model(ARCHITECTURES["llama"](), config)
        assert model.peft_config["default"].experts == EXPERTS["llama"]


def _tensors(file: Any) -> dict[str, Tensor]:
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)


class TestCopies:
    @pytest.mark.parametrize("use_dora", [False, True], ids=["milora", "midora"])
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_a_copy_is_the_same_and_its_own(self, copied: Any, use_dora: bool) -> None:
        model = adapted(use_dora=use_dora).model
        before = logits_of(model)
        other = copied(model)
        assert torch.equal(logits_of(other), before)
        with other.disable_adapter():
            assert torch.equal(logits_of(model), before)
        for parameter in other.parameters():
            parameter.data.zero_()
        assert torch.equal(logits_of(model), before)
        assert other.base_model.owner is not model.base_model.owner
        routers = routers_of(other).values()
        assert all(router.owner is other.base_model.owner for router in routers)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_a_copy_is_unloaded_on_its_own(self, copied: Any) -> None:
        model = adapted().model
        before, hooks = logits_of(model), hooks_of(model)
        bare = copied(model).unload()
        assert hooks_of(bare) == 0
        assert torch.equal(logits_of(bare), logits_of(ARCHITECTURES["llama"]()))
        assert hooks_of(model) == hooks
        assert torch.equal(logits_of(model), before)

    def test_a_copy_in_the_middle_of_a_generation_has_nothing_in_force(self) -> None:
        model = adapted().model
        copies = []

        class Copying(LogitsProcessor):
            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                copies.append(copy.deepcopy(model))
                return scores

        expected = generate(model)
        assert generate(model, slice(0, 1), logits_processor=[Copying()], max_new_tokens=2)
        assert generate(copies[0]) == expected


class TestPrecision:
    def test_routers_stay_in_float32_and_decide_alike(self) -> None:
        model = adapted().model
        exact = model.route(**BATCH)
        model.to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.float32 if "milora_router" in name else torch.bfloat16), name
        rounded = model.route(**BATCH)
        assert rounded.probabilities.dtype == torch.float32
        ordered = exact.probabilities.sort(dim=-1, descending=True).values
        clear = (ordered[..., 1] - ordered[..., 2]) > 0.05
        assert clear.sum() >= 3
        assert torch.equal(exact.chosen[clear], rounded.chosen[clear])

    def test_a_bfloat16_backbone_has_float32_adapters_and_serves(self) -> None:
        model = adapted(dtype=torch.bfloat16).model
        adapter = {name: p for name, p in model.named_parameters() if ".default" in name}
        assert all(parameter.dtype == torch.float32 for parameter in adapter.values())
        assert logits_of(model).dtype == torch.bfloat16
        assert generate(model) == [generate(model, slice(row, row + 1))[0] for row in range(4)]

    def test_autocast(self) -> None:
        model = adapted().model
        exact = model.route(**BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            route = model.route(**BATCH)
        # The first block's input is the embedding, which autocast does not change.
        assert torch.equal(route.probabilities[0], exact.probabilities[0])


class TestRegistry:
    def test_peft_knows_the_method(self) -> None:
        message = "PEFT has changed how its methods are listed: see milora/tuners/registry.py"
        assert PeftType("MILORA") is PeftType.MILORA is PeftType["MILORA"], message
        assert "MILORA" in PeftType.__members__, message
        assert PeftType.MILORA in list(PeftType), message
        assert PeftType.MILORA == "MILORA", message
        assert json.dumps(PeftType.MILORA) == '"MILORA"', message
        assert pickle.loads(pickle.dumps(PeftType.MILORA)) is PeftType.MILORA, message
        for table in ("_member_map_", "_value2member_map_", "_member_names_"):
            assert "MILORA" in getattr(PeftType, table), message
        assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.MILORA] is MiLoraConfig, message
        assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.MILORA] is MiLoraModel, message

    def test_registering_again_changes_nothing(self) -> None:
        before = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING), PeftType.MILORA
        register("MILORA", MiLoraConfig, MiLoraModel, prefix="lora_")
        assert (list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING), PeftType.MILORA) == before


class TestLoraOptions:
    @pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon"])
    @pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
    def test_with_all_experts_it_is_pefts_lora(self, name: str, use_dora: bool) -> None:
        experts = EXPERTS[name]
        model = adapted(name, top_k=len(experts), use_dora=use_dora).model
        backbone = ARCHITECTURES[name]()
        paths = [f"{BLOCKS[name]}.{block}.{expert}" for block in range(2) for expert in experts]
        config = LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=paths,
            use_dora=use_dora,
            fan_in_fan_out=name == "gpt2",
            task_type="CAUSAL_LM",
        )
        plain = get_peft_model(backbone, config).eval()
        tensors = get_peft_model_state_dict(model)
        ours = {name: tensor for name, tensor in tensors.items() if "milora_router" not in name}
        assert set(ours) == set(get_peft_model_state_dict(plain))
        for path, parameter in plain.named_parameters():
            if ".default" in path:
                parameter.data.copy_(dict(model.named_parameters())[path])
        labels = INPUT_IDS.masked_fill(ATTENTION_MASK == 0, -100)
        labels[:, :-2] = -100
        losses = [each(**BATCH, labels=labels).loss for each in (model, plain)]
        assert torch.equal(*losses)
        assert torch.equal(logits_of(model), logits_of(plain))
        for loss in losses:
            loss.backward()
        gradients = {path: parameter.grad for path, parameter in model.named_parameters()}
        checked = 0
        for path, parameter in plain.named_parameters():
            if parameter.requires_grad:
                assert gradients[path] is not None, path
                torch.testing.assert_close(gradients[path], parameter.grad, rtol=1e-5, atol=1e-6)
                checked += 1
        assert checked == len(ours)

    @pytest.mark.parametrize(
        ("settings", "experts"),
        [
            ({"target_modules": ["q_proj", "v_proj"]}, ["self_attn.q_proj", "self_attn.v_proj"]),
            ({"target_modules": ["mlp.up_proj", "v_proj"]}, ["self_attn.v_proj", "mlp.up_proj"]),
            ({"target_modules": r".*\.(q_proj|down_proj)"}, ["self_attn.q_proj", "mlp.down_proj"]),
            ({"target_modules": r".*layers\.1\..*\.(o|up)_proj"}, {1: ["self_attn.o_proj", "mlp.up_proj"]}),
            ({"exclude_modules": ["gate_proj", "up_proj", "down_proj"]}, EXPERTS["llama"][:4]),
            ({"layers_to_transform": [1]}, {1: EXPERTS["llama"]}),
            ({"layers_to_transform": 0}, {0: EXPERTS["llama"]}),
            (
                {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
                {0: ["self_attn.q_proj"]},
            ),
            # Modules outside the blocks are no experts.
            ({"target_modules": ["k_proj", "lm_head"]}, ["self_attn.k_proj"]),
        ],
        ids=str,
    )
    def test_target_modules(self, settings: dict[str, Any], experts: Any, tmp_path: Path) -> None:
        model = get_peft_model(
            ARCHITECTURES["llama"](), MiLoraConfig(r=2, top_k=1, init_lora_weights=False, **settings)
        ).eval()
        config = model.peft_config["default"]
        blocks = (0, 1) if isinstance(experts, list) else tuple(experts)
        expected = {
            f"model.layers.{block}": experts if isinstance(experts, list) else experts[block] for block in blocks
        }
        assert config.experts == (experts if isinstance(experts, list) else expected)
        adapted_modules = {
            path.removeprefix("base_model.model.")
            for path, module in model.named_modules()
            if isinstance(module, LoraLayer)
        }
        assert adapted_modules == {f"{block}.{name}" for block, names in expected.items() for name in names}
        assert tuple(routers_of(model)) == model.route(**BATCH).blocks == tuple(expected)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(ARCHITECTURES["llama"](), tmp_path)
        assert torch.equal(logits_of(loaded), logits_of(model))
        with model.disable_adapter():
            backbone = logits_of(model)
        assert not torch.allclose(logits_of(model), backbone)

    def test_rank_and_alpha_patterns_and_rslora(self, tmp_path: Path) -> None:
        config = MiLoraConfig(
            r=4,
            lora_alpha=8,
            top_k=7,
            rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 3},
            alpha_pattern={"v_proj": 20},
            use_rslora=True,
            init_lora_weights=False,
        )
        model = get_peft_model(ARCHITECTURES["llama"](), config).eval()
        layers = {path[len("base_model.model.model.layers.") :]: m for path, m in model.named_modules()}
        assert layers["0.self_attn.q_proj"].lora_A["default"].weight.shape[0] == 2
        assert layers["0.mlp.up_proj"].r["default"] == 4
        assert layers["1.mlp.up_proj"].r["default"] == 3
        assert layers["1.self_attn.v_proj"].scaling["default"] == 20 / 2
        merged = ARCHITECTURES["llama"]()
        with torch.no_grad():
            for path, module in model.base_model.model.named_modules():
                if isinstance(module, LoraLayer):
                    delta = module.lora_B["default"].weight @ module.lora_A["default"].weight
                    weight_of(merged.get_submodule(path)).add_(delta * module.scaling["default"])
        torch.testing.assert_close(logits_of(model), logits_of(merged), rtol=1e-3, atol=1e-3)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(ARCHITECTURES["llama"](), tmp_path)
        assert torch.equal(logits_of(loaded), logits_of(model))

    def test_bias_of_the_experts(self, tmp_path: Path) -> None:
        config = MiLoraConfig(r=2, lora_bias=True, top_k=1)
        model = get_peft_model(ARCHITECTURES["gpt2"](), config).eval()
        with model.disable_adapter():
            backbone = logits_of(model)
        assert torch.equal(logits_of(model), backbone)
        for name, parameter in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                parameter.data.normal_()
        assert not torch.allclose(logits_of(model), backbone)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(ARCHITECTURES["gpt2"](), tmp_path)
        assert torch.equal(logits_of(loaded), logits_of(model))

    def test_dropout_in_training_alone(self) -> None:
        model = adapted(top_k=7).model
        dropped = get_peft_model(ARCHITECTURES["llama"](), MiLoraConfig(r=4, top_k=7, lora_dropout=0.5))
        for name, parameter in dropped.named_parameters():
            parameter.data.copy_(dict(model.named_parameters())[name])
        assert torch.equal(logits_of(dropped.eval()), logits_of(model))
        labels = INPUT_IDS.masked_fill(ATTENTION_MASK == 0, -100)
        labels[:, :-2] = -100
        dropped.train()
        assert not torch.equal(logits_of(dropped, labels=labels), logits_of(dropped, labels=labels))

    def test_a_center_learns_once_a_pass_and_is_saved(self, tmp_path: Path) -> None:
        labels = INPUT_IDS.masked_fill(ATTENTION_MASK == 0, -100)
        labels[:, :-2] = -100
        centers = []
        for checkpointing in (False, True):
            model = get_peft_model(ARCHITECTURES["llama"](), MiLoraConfig(r=2, router_norm="centered")).train()
            if checkpointing:
                # Runs each block twice.
                model.base_model.model.gradient_checkpointing_enable()
            for input_ids in (INPUT_IDS, INPUT_IDS.roll(1, dims=1)):
                model(input_ids=input_ids, attention_mask=ATTENTION_MASK, labels=labels).loss.backward()
            centers.append([router.pooler["default"].center for router in routers_of(model).values()])
        for plain, checkpointed in zip(*centers, strict=True):
            assert plain.any()
            torch.testing.assert_close(plain, checkpointed)
        model.eval().save_pretrained(tmp_path)
        with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
            saved = _tensors(file)
        for index, center in enumerate(centers[1]):
            assert torch.equal(saved[f"base_model.model.model.layers.{index}.milora_router.pooler.center"], center)
        for low_cpu_mem_usage in (False, True):
            loaded = PeftModel.from_pretrained(ARCHITECTURES["llama"](), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
            assert torch.equal(logits_of(loaded), logits_of(model))

    def test_modules_to_save(self, tmp_path: Path) -> None:
        model = get_peft_model(ARCHITECTURES["llama"](), MiLoraConfig(r=2, modules_to_save=["lm_head"])).eval()
        model.base_model.model.lm_head.modules_to_save["default"].weight.data.normal_()
        model.save_pretrained(tmp_path)
        for low_cpu_mem_usage in (False, True):
            loaded = PeftModel.from_pretrained(ARCHITECTURES["llama"](), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
            assert torch.equal(logits_of(loaded), logits_of(model))
        with model.disable_adapter():
            assert torch.equal(logits_of(model), logits_of(ARCHITECTURES["llama"]()))

    def test_an_activation_for_each_routed_block(self, tmp_path: Path) -> None:
        config = MiLoraConfig(r=2, router_activation=["relu", "rational-tanh"], rational_orders=(4, 3))
        model = get_peft_model(ARCHITECTURES["llama"](), config).eval()
        keys = [name for name in get_peft_model_state_dict(model) if ".activation." in name]
        assert keys == [
            f"base_model.model.model.layers.1.milora_router.activation.{n}" for n in ("numerator", "denominator")
        ]
        model.save_pretrained(tmp_path)
        assert torch.equal(logits_of(PeftModel.from_pretrained(ARCHITECTURES["llama"](), tmp_path)), logits_of(model))


def test_trained_tokens_of_a_tied_embedding_are_loaded(tmp_path: Path) -> None:
    """PEFT wraps the tied head too, but saves the tokens once."""
    backbone = ARCHITECTURES["llama"]()
    backbone.config.tie_word_embeddings = True
    backbone.tie_weights()
    fresh = copy.deepcopy(backbone)
    fresh.tie_weights()
    model = perturbed(get_peft_model(backbone, MiLoraConfig(r=4, top_k=2, trainable_token_indices=[3, 4])), 0.1)
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5, 6, 3, 8]])
    found = PeftModel.from_pretrained(fresh, tmp_path).eval()(input_ids=ids).logits
    torch.testing.assert_close(found, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("task", "kind"), [("SEQ_CLS", LlamaForSequenceClassification), ("TOKEN_CLS", LlamaForTokenClassification)]
)
def test_a_classifiers_adapter_is_loaded(task: str, kind: type[Any], tmp_path: Path) -> None:
    """PEFT lists two names for the head in the adapter's configuration, of which a model has one."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    backbone = kind(config)
    fresh = copy.deepcopy(backbone)
    model = perturbed(get_peft_model(backbone, MiLoraConfig(task_type=task, r=4, top_k=2)), 0.1)
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5, 6, 3, 8]])
    found = PeftModel.from_pretrained(fresh, tmp_path).eval()(input_ids=ids).logits
    torch.testing.assert_close(found, model(input_ids=ids).logits)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {name: value for name, value in load_file(path).items() if "score" not in name}
    save_file(tensors, path)
    with pytest.raises(MiLoraError, match="no tensors of 'classifier' or 'score'"):
        PeftModel.from_pretrained(fresh, tmp_path)
