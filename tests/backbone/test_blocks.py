"""Finding the Transformer blocks and the modules that can be experts, compared with lists written by hand."""

from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model
from support.adapted import ALL_ARCHITECTURES, adapted
from support.architectures import ARCHITECTURES, BLOCKS, EXPERTS, HIDDEN, UNEVEN_ARCHITECTURES, UNEVEN_EXPERTS
from torch import nn

from milora import MiLoraConfig, MiLoraError
from milora.backbone.blocks import find_blocks, hidden_size, is_linear


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name: str) -> None:
    model = ARCHITECTURES[name]()
    blocks = find_blocks(model)
    assert [block.path for block in blocks] == [f"{BLOCKS[name]}.{index}" for index in range(2)]
    for block in blocks:
        assert block.module is model.get_submodule(block.path)
        assert list(block.linears) == EXPERTS[name]
        assert all(module is block.module.get_submodule(path) for path, module in block.linears.items())
        assert hidden_size(model, block) == HIDDEN


@pytest.mark.parametrize("name", UNEVEN_ARCHITECTURES)
def test_uneven_architectures(name: str) -> None:
    blocks = find_blocks(UNEVEN_ARCHITECTURES[name]())
    assert {block.path: list(block.linears) for block in blocks} == UNEVEN_EXPERTS[name]


@pytest.mark.parametrize("name", ALL_ARCHITECTURES)
def test_an_adapted_model_has_the_same_experts(name: str) -> None:
    plain = {block.path: list(block.linears) for block in find_blocks(ALL_ARCHITECTURES[name]())}
    model = adapted(name).model.base_model.model
    assert {block.path: list(block.linears) for block in find_blocks(model)} == plain


def test_a_model_with_lora_of_peft_has_the_same_experts() -> None:
    model = get_peft_model(ARCHITECTURES["llama"](), LoraConfig(target_modules=["q_proj", "up_proj"]))
    for block in find_blocks(model.base_model.model):
        assert list(block.linears) == EXPERTS["llama"]


class Plain(nn.Module):
    """A model without a configuration: two blocks, and a shorter list of other linear modules."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}) for _ in range(2))
        self.heads = nn.ModuleList([nn.Linear(4, 2)])
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(5))


def test_without_a_configuration_the_longest_list_with_linear_modules() -> None:
    assert [block.path for block in find_blocks(Plain())] == ["trunk.0", "trunk.1"]


def test_by_hand() -> None:
    model = Plain()
    model.heads = nn.ModuleList(nn.ModuleDict({"out": nn.Linear(4, 2)}) for _ in range(2))
    with pytest.raises(MiLoraError, match="Could not find"):
        find_blocks(model)
    assert [list(block.linears) for block in find_blocks(model, "heads")] == [["out"], ["out"]]


def test_an_unreadable_model_is_told_what_was_looked_for_and_how_to_help() -> None:
    model = Plain()
    model.config = SimpleNamespace(num_hidden_layers=7)
    with pytest.raises(MiLoraError, match=r"blocks of Plain: .* one list of 7 modules, found none\..*blocks='model"):
        find_blocks(model)
    model.config.num_hidden_layers = 2
    model.other = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 8)}) for _ in range(2))
    with pytest.raises(MiLoraError, match=r"found \['other', 'trunk'\].*blocks="):
        find_blocks(model)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("layers", "has no such module"),
        ("trunk.0.up", "is a Linear, not a ModuleList"),
        ("empty", "ModuleList with entries"),
        ("norms", "no linear module"),
    ],
)
def test_a_wrong_path(path: str, message: str) -> None:
    model = Plain()
    model.empty = nn.ModuleList()
    with pytest.raises(MiLoraError, match=f"{path}.*Plain.*{message}|{path}.*{message}"):
        find_blocks(model, path)


def test_the_argument_reaches_the_discovery() -> None:
    with pytest.raises(MiLoraError, match=r"'model\.blocks': LlamaForCausalLM has no such module"):
        get_peft_model(ARCHITECTURES["llama"](), MiLoraConfig(blocks="model.blocks"))
    model = ARCHITECTURES["llama"]()
    # A second tower inside the decoder with the same depth makes the choice ambiguous.
    model.model.tower = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 8)}) for _ in range(2))
    with pytest.raises(MiLoraError, match=r"found \['model\.layers', 'model\.tower'\]"):
        get_peft_model(model, MiLoraConfig(r=4))
    assert get_peft_model(model, MiLoraConfig(r=4, blocks="model.layers")).peft_config["default"].experts


def test_a_tower_outside_the_decoder_is_no_candidate() -> None:
    model = ARCHITECTURES["llama"]()
    model.vision = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 8)}) for _ in range(2))
    assert [block.path for block in find_blocks(model)] == ["model.layers.0", "model.layers.1"]


def test_the_hidden_size_must_be_known() -> None:
    model = Plain()
    with pytest.raises(MiLoraError, match=r"Plain does not define .*config\.hidden_size.*trunk\.0"):
        hidden_size(model, find_blocks(model)[0])


def test_what_is_linear() -> None:
    class Quantised(nn.Module):
        in_features, out_features = 4, 8

    class OldQuantised(nn.Module):
        infeatures, outfeatures = 4, 8

    assert all(map(is_linear, (nn.Linear(2, 2), Quantised(), OldQuantised())))
    others = (nn.Bilinear(2, 2, 2), nn.LazyLinear(2), nn.Embedding(2, 2), nn.LayerNorm(2), nn.Conv1d(2, 2, 1))
    assert not any(map(is_linear, others))
