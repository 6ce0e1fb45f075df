"""Errors: every mistake gets a message that names it, and the model stays unchanged."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.adapted import Snapshot, adapted, add_adapter, assert_nothing_in_force, saved
from support.architectures import ARCHITECTURES, pad, random_prompts
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, DynamicCache, T5Config

from milora import MiLoraConfig, MiLoraError

INPUT_IDS, ATTENTION_MASK = pad(random_prompts(3, (3, 6)), "left")
WEIGHTS = "adapter_model.safetensors"
ROUTER = "base_model.model.model.layers.1.milora_router."
EXPERT = "base_model.model.model.layers.0.mlp.up_proj."


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k must be an integer of at least 1; found 0"),
        ({"top_k": 2.0}, "top_k must be an integer"),
        ({"pooler": "median"}, "Unknown pooler 'median'; choose one of"),
        ({"router_norm": "token"}, "Unknown router_norm 'token'; choose one of"),
        ({"router_activation": "swish"}, "Unknown router_activation 'swish'"),
        ({"router_activation": "rational-swish"}, "Unknown router_activation 'rational-swish'"),
        ({"router_activation": ["relu", "swish"]}, "Unknown router_activation 'swish'"),
        ({"gate": "soft"}, "Unknown gate 'soft'; choose one of"),
        ({"rational_orders": [6, 0]}, "rational_orders must be two integers"),
        ({"load_balancing_coef": -1.0}, "must not be negative"),
        ({"init_lora_weights": "pissa"}, "changes the backbone's weights"),
        ({"target_parameters": ["mlp.up_proj.weight"]}, "target_parameters cannot be combined"),
    ],
    ids=str,
)
def test_configurations(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MiLoraError, match=message):
        MiLoraConfig(**settings)


BUILDING: dict[str, tuple[dict[str, Any], str]] = {
    "too many experts wanted": ({"top_k": 8}, "between 1 and the number of experts of a block, 7; found 8"),
    "no such target": ({"target_modules": ["query"]}, r"\['query'\] matches no linear module.*They have \['self_attn"),
    "no target left": ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "matches no linear module"),
    "activations for other blocks": ({"router_activation": ["relu"]}, "lists 1 activations, but 2 blocks"),
    "blocks that are not there": ({"blocks": "model.blocks"}, "has no such module"),
    "experts that are not there": ({"experts": ["self_attn.query"]}, r"another backbone.*\['self_attn\.query'\]"),
}


@pytest.mark.parametrize(("settings", "message"), BUILDING.values(), ids=BUILDING)
def test_building(settings: dict[str, Any], message: str) -> None:
    backbone = ARCHITECTURES["llama"]()
    before = Snapshot(backbone)
    with pytest.raises(MiLoraError, match=message):
        get_peft_model(backbone, MiLoraConfig(r=2, **settings))
    before.assert_unchanged(backbone)
    model = adapted().model
    before = Snapshot(model)
    with pytest.raises(MiLoraError, match=message):
        model.add_adapter("other", MiLoraConfig(r=2, **settings))
    before.assert_unchanged(model)


def test_a_failure_in_the_middle_of_building(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, model = ARCHITECTURES["llama"](), adapted(use_dora=True).model
    model.add_adapter("narrow", MiLoraConfig(r=2, top_k=1, target_modules=["q_proj"]))
    snapshots = Snapshot(backbone), Snapshot(model)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("milora.tuners.milora.router.build_pooler", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        get_peft_model(backbone, MiLoraConfig(r=2))
    with pytest.raises(RuntimeError, match="out of memory"):
        model.add_adapter("other", MiLoraConfig(r=2))
    snapshots[0].assert_unchanged(backbone)
    snapshots[1].assert_unchanged(model)


def test_an_encoder_decoder() -> None:
    config = T5Config(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, vocab_size=20)
    backbone = AutoModelForSeq2SeqLM.from_config(config)
    before = Snapshot(backbone)
    with pytest.raises(MiLoraError, match="T5ForConditionalGeneration is an encoder-decoder"):
        get_peft_model(backbone, MiLoraConfig(r=2))
    before.assert_unchanged(backbone)


@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_adapter(),
        lambda model: model.merge_and_unload(),
        lambda model: model.base_model.model.model.layers[0].mlp.up_proj.merge(),
        lambda model: model.base_model.model.model.layers[0].mlp.up_proj.merge(safe_merge=True),
    ],
)
@pytest.mark.parametrize("use_dora", [False, True], ids=["milora", "midora"])
def test_merging(merge: Callable[[PeftModel], Any], use_dora: bool) -> None:
    model = adapted(use_dora=use_dora).model
    before = Snapshot(model)
    with pytest.raises(MiLoraError, match=r"depend on the prompt.*milora export"):
        merge(model)
    before.assert_unchanged(model)


def test_several_adapters_at_once() -> None:
    model = adapted().model
    add_adapter(model, "other", seed=7)
    before = Snapshot(model)
    with pytest.raises(MiLoraError, match=r"Only one .*\['default', 'other'\].*adapter_names"):
        model.base_model.set_adapter(["default", "other"])
    with pytest.raises(MiLoraError, match="no weighted sum"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mixed")
    with pytest.raises(ValueError, match="missing"):
        model.set_adapter("missing")
    before.assert_unchanged(model)


# ------------------------------------------------------------------- adapter files


def edited(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return edit


def configured(**fields: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return edit


def truncated(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-100])


def emptied(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


class Exploding:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Exploding()))


FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a router's tensor is missing": (
        edited(lambda tensors: tensors.pop(f"{ROUTER}projection.weight")),
        r"lacks 1 tensors.*layers\.1\.milora_router\.projection",
    ),
    "an expert's tensor is missing": (
        edited(lambda tensors: tensors.pop(f"{EXPERT}lora_B.weight")),
        r"lacks 1 tensors.*mlp\.up_proj\.lora_B",
    ),
    "a tensor too many": (
        edited(lambda tensors: tensors.update({f"{ROUTER}pooler.bias": torch.zeros(1)})),
        r"does not have.*pooler\.bias",
    ),
    "a block too many": (
        edited(lambda tensors: tensors.update({"base_model.model.model.layers.2.x.lora_A.weight": torch.zeros(1)})),
        r"does not have.*layers\.2",
    ),
    "something else in the file": (
        edited(lambda tensors: tensors.update({"base_model.model.model.layers.0.mlp.extra": torch.zeros(1)})),
        r"does not have.*mlp\.extra",
    ),
    "another rank": (configured(r=5), r"another backbone or rank: \d+ tensors differ"),
    "other orders": (configured(rational_orders=[5, 5]), r"differ in size.*numerator"),
    "another pooler": (configured(pooler="mean"), r"does not have.*pooler"),
    "another number of experts": (
        edited(lambda tensors: tensors.update({f"{ROUTER}projection.weight": torch.zeros(6, 32)})),
        r"projection\.\S+ is \(6, 32\), the backbone needs \(7, 32\)",
    ),
    "NaN": (
        edited(lambda tensors: tensors[f"{EXPERT}lora_A.weight"][0].fill_(float("nan"))),
        r"NaN or infinity in 1 tensors.*mlp\.up_proj",
    ),
    "infinity in a router": (
        edited(lambda tensors: tensors[f"{ROUTER}activation.numerator"].fill_(float("inf"))),
        r"NaN or infinity in 1 tensors.*numerator",
    ),
    "other modules": (configured(experts=["attn.c_attn"], top_k=1), r"another backbone.*\['attn\.c_attn'\]"),
    "a block that is not there": (
        configured(experts={"model.layers.7": ["mlp.up_proj"]}, top_k=1),
        r"model\.layers\.7.*has no such block",
    ),
    "an unknown gate": (configured(gate="soft"), "Unknown gate"),
    "top_k out of range": (configured(top_k=9), "top_k"),
    "a module to save that the file lacks": (configured(modules_to_save=["lm_head"]), "no tensors of 'lm_head'"),
    "truncated": (truncated, f"{WEIGHTS} is truncated"),
    "empty": (emptied, f"{WEIGHTS} is truncated"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"no {WEIGHTS}"),
    "pickled": (pickled, r"pickled adapter_model\.bin.*not opened"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def generated() -> Tensor:
    return adapted().model.generate(INPUT_IDS, attention_mask=ATTENTION_MASK, max_new_tokens=4)


LOW_MEMORY = ("an expert's tensor is missing", "another rank", "NaN")


@pytest.mark.parametrize(
    ("problem", "low_cpu_mem_usage"), [*((name, False) for name in FILES), *((name, True) for name in LOW_MEMORY)]
)
def test_files(
    problem: str,
    low_cpu_mem_usage: bool,
    sound: Path,
    generated: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil, message = FILES[problem]
    folder = Path(shutil.copytree(sound, tmp_path / "adapter"))
    spoil(folder)
    backbone = ARCHITECTURES["llama"]()
    before = Snapshot(backbone)
    with pytest.raises(MiLoraError, match=message):
        PeftModel.from_pretrained(backbone, folder, low_cpu_mem_usage=low_cpu_mem_usage)
    before.assert_unchanged(backbone)
    # On top of an adapter with fewer modules, where a failed load could leave new LoRA layers behind.
    model = get_peft_model(backbone, MiLoraConfig(r=2, top_k=1, target_modules=["q_proj", "v_proj"])).eval()
    before = Snapshot(model)
    with pytest.raises(MiLoraError, match=message):
        model.load_adapter(folder, "other", low_cpu_mem_usage=low_cpu_mem_usage)
    before.assert_unchanged(model)
    assert not (tmp_path / "exploded").exists()
    # A valid adapter can still be loaded under the same name.
    model.load_adapter(sound, "other", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("other")
    assert torch.equal(model.generate(INPUT_IDS, attention_mask=ATTENTION_MASK, max_new_tokens=4), generated)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "phi3", "mixtral", "opt"])
def test_an_adapter_of_another_backbone(name: str, sound: Path) -> None:
    backbone = ARCHITECTURES[name]()
    before = Snapshot(backbone)
    with pytest.raises(MiLoraError, match="another backbone"):
        PeftModel.from_pretrained(backbone, sound)
    before.assert_unchanged(backbone)


def test_bad_weights_for_an_adapter_in_use_leave_it_alone(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    FILES["NaN"][0](folder)
    model = adapted(seed=3).model
    before = Snapshot(model)
    with pytest.raises(MiLoraError, match="NaN"):
        model.load_adapter(folder, "default")
    before.assert_unchanged(model)


def test_bad_weights_for_a_loaded_adapter_leave_it_alone(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    model = PeftModel.from_pretrained(ARCHITECTURES["llama"](), folder)
    before = Snapshot(model)
    FILES["NaN"][0](folder)
    with pytest.raises(MiLoraError, match="NaN"):
        model.load_adapter(folder, "default")
    before.assert_unchanged(model)


# ----------------------------------------------------------------- inputs of a pass


def one_row_masked() -> Tensor:
    mask = ATTENTION_MASK.clone()
    mask[1] = 0
    return mask


POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2]] * 3)[:, : INPUT_IDS.shape[1]]
INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "an empty prompt": ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "at least one token"),
    "a masked row": ({"input_ids": INPUT_IDS, "attention_mask": one_row_masked()}, r"row\(s\) \[1\] is masked"),
    "restarting positions": (
        {"input_ids": torch.ones(3, POSITIONS.shape[1], dtype=torch.long), "position_ids": POSITIONS},
        "position_ids start again.*packing=False",
    ),
    "an unknown adapter": (
        {"input_ids": INPUT_IDS, "adapter_names": ["default", "missing", "__base__"]},
        r"No adapter named 'missing'; there are \['default'\]",
    ),
    "too few adapter names": (
        {"input_ids": INPUT_IDS, "adapter_names": ["default"] * 2},
        "adapter_names names 2 rows; .* 3",
    ),
    "no adapter names": ({"input_ids": INPUT_IDS, "adapter_names": []}, "adapter_names"),
}


@pytest.mark.parametrize(("inputs", "message"), INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("call", ["forward", "generate", "route"])
def test_inputs(call: str, inputs: dict[str, Any], message: str) -> None:
    model = adapted().model
    before, logits = Snapshot(model), model(INPUT_IDS).logits
    settings = {"max_new_tokens": 2} if call == "generate" else {}
    with pytest.raises(MiLoraError, match=message):
        getattr(model, call)(**inputs, **settings)
    before.assert_unchanged(model)
    assert_nothing_in_force(model)
    assert torch.equal(model(INPUT_IDS).logits, logits)


@pytest.mark.parametrize("argument", ["cu_seq_lens_q", "seq_idx"])
def test_rows_packed_for_flash_attention(argument: str) -> None:
    with pytest.raises(MiLoraError, match=f"{argument} was passed.*packing=False"):
        adapted().model(INPUT_IDS, **{argument: torch.tensor([0, 3, 6])})


def test_no_tokens_at_all() -> None:
    with pytest.raises(MiLoraError, match="needs input_ids"):
        adapted().model(attention_mask=ATTENTION_MASK)


def test_adapter_names_in_training() -> None:
    model = adapted().model.train()
    with pytest.raises(MiLoraError, match=r"model\.eval\(\)"):
        model(INPUT_IDS, adapter_names=["default"] * 3)


def test_a_filled_cache_without_its_route() -> None:
    model = adapted().model
    cache = DynamicCache(config=model.config)
    model.generate(INPUT_IDS, past_key_values=cache, max_new_tokens=2)
    length = cache.get_seq_length()
    before = Snapshot(model)
    longer = torch.cat([INPUT_IDS, INPUT_IDS], dim=1)
    with pytest.raises(MiLoraError, match=r"route=.*model\.route"):
        model.generate(longer, past_key_values=cache, max_new_tokens=2)
    assert cache.get_seq_length() == length
    bare = DynamicCache(config=model.config)
    with model.disable_adapter():
        model(INPUT_IDS, past_key_values=bare)
    with pytest.raises(MiLoraError, match="unknown route"):
        model(INPUT_IDS[:, :1], past_key_values=bare)
    before.assert_unchanged(model)


def test_a_prompt_mask_of_another_shape() -> None:
    model = adapted().model
    with pytest.raises(MiLoraError, match="use_prompt was given a mask of shape"), model.use_prompt(torch.ones(3, 2)):
        model(INPUT_IDS)
