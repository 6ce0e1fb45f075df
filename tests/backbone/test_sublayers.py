"""Finding the attention and feed-forward of a block in every architecture, and the errors if there are none."""

import pytest
import torch
from support.architectures import ARCHITECTURES, HIDDEN, UNEVEN_ARCHITECTURES, random_prompts
from torch import Tensor, nn

from milora import MiLoraError
from milora.backbone.blocks import Block, find_blocks
from milora.backbone.sublayers import SUBLAYER_NAMES, find_sublayers

# Written by reading transformers' sources: (module read, module changed) of attention and of feed-forward.
_USUAL = (("self_attn", "self_attn"), ("mlp", "mlp"))
_GPT2 = (("attn", "attn"), ("mlp", "mlp"))
_BLOOM = (("self_attention", "self_attention"), ("mlp", "mlp"))
_OPT = (("self_attn", "self_attn"), ("fc1", "fc2"))
SUBLAYERS = {
    **dict.fromkeys(("llama", "mistral", "qwen3", "gemma2", "gemma3", "olmo2", "cohere2", "phi3"), _USUAL),
    **dict.fromkeys(("mixtral", "qwen2_moe", "deepseek_v3", "afmoe"), _USUAL),
    **dict.fromkeys(("gpt2", "gpt_bigcode", "gptj", "gpt_neo"), _GPT2),
    "gpt_neox": (("attention", "attention"), ("mlp", "mlp")),
    **dict.fromkeys(("bloom", "falcon", "falcon_alibi"), _BLOOM),
    "mpt": (("attn", "attn"), ("ffn", "ffn")),
    **dict.fromkeys(("opt", "opt_post_norm"), _OPT),
}
INPUT_IDS = torch.tensor(random_prompts(2, 5, seed=1))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sublayers(name: str) -> None:
    for block in find_blocks(ARCHITECTURES[name]()):
        found = find_sublayers(block)
        assert list(found) == list(SUBLAYER_NAMES)
        assert tuple((s.input_path, s.output_path) for s in found.values()) == SUBLAYERS[name]
        assert [s.kind for s in found.values()] == list(found)


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_their_outputs_reach_the_block_once(name: str) -> None:
    """Each sub-layer's output module is called once per pass, has the hidden states' shape and affects the logits."""
    model = ARCHITECTURES[name]()
    bare = model(INPUT_IDS).logits
    block = find_blocks(model)[-1]
    for sublayer in find_sublayers(block).values():
        calls = []

        def change(module: nn.Module, args: object, output: Tensor | tuple, calls: list = calls) -> Tensor | tuple:
            first = output[0] if isinstance(output, tuple) else output
            assert first.shape[-1] == HIDDEN
            calls.append(first)
            changed = first + torch.linspace(-1, 1, HIDDEN)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handle = block.module.get_submodule(sublayer.output_path).register_forward_hook(change)
        assert (model(INPUT_IDS).logits - bare).abs().max() > 0.01
        handle.remove()
        assert len(calls) == 1


def test_a_block_may_have_something_else_in_the_place_of_attention() -> None:
    convolution, attention = find_blocks(UNEVEN_ARCHITECTURES["lfm2"]())
    assert list(find_sublayers(convolution)) == ["feed_forward"]
    assert list(find_sublayers(attention)) == ["attention", "feed_forward"]


def test_a_block_without_sublayers() -> None:
    module = nn.ModuleDict({"up": nn.Linear(4, 8), "fc1": nn.Linear(8, 4), "mlp": nn.ModuleList([nn.Linear(4, 4)])})
    with pytest.raises(
        MiLoraError, match=r"trunk\.0 \(ModuleDict\): looked for self_attn.*fc1 with fc2, found up, fc1\."
    ):
        find_sublayers(Block("trunk.0", module, {}))
