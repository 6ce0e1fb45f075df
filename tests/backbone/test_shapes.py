"""The named shapes have the published parameter counts and use no memory on the meta device."""

import resource

import pytest
import torch
from transformers import PreTrainedModel

from milora import MiLoraError
from milora.backbone.blocks import find_blocks
from milora.backbone.shapes import SHAPES, build, shape_config

# From the checkpoints on the hub (sum of the tensors; tied tensors count once).
PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "gemma-2b": 2_506_172_416,
    "tinyllama-1.1b": 1_100_048_384,
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_its_published_size_and_no_weights(name: str) -> None:
    model = build(name)
    assert isinstance(model, PreTrainedModel)
    assert not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(find_blocks(model)[0].linears) == 7


def test_every_shape_is_held_against_its_size() -> None:
    assert set(SHAPES) == set(PARAMETERS)


def test_the_largest_takes_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    build("llama-2-70b")
    # In KiB. Its weights would need 257 GiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_with_weights_it_computes() -> None:
    model = build("tinyllama-1.1b", "cpu", torch.bfloat16, num_hidden_layers=1, vocab_size=50, intermediate_size=64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 3, 50)
    assert logits.isfinite().all()


def test_a_setting_that_is_none() -> None:
    with pytest.raises(MiLoraError, match=r"LlamaConfig has no field 'num_layers'.*num_hidden_layers"):
        build("llama-2-7b", num_layers=2)


def test_an_unknown_name_gets_the_nearest_ones() -> None:
    with pytest.raises(MiLoraError, match=r"no backbone shape 'llama2-7b'.*did you mean 'llama-2-7b'"):
        build("llama2-7b")


def test_a_folder_s_configuration(tmp_path: object) -> None:
    shape_config("gemma-2b").save_pretrained(tmp_path)
    assert shape_config(str(tmp_path)).head_dim == 256
