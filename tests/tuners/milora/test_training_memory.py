"""The memory that a training step keeps for its backward pass, compared with PEFT's LoRA on the same modules."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.architectures import ARCHITECTURES, random_prompts
from torch import Tensor, nn

from milora import MiLoraConfig, Route

INPUT_IDS = torch.tensor(random_prompts(8, 24, seed=3))
LABELS = INPUT_IDS.masked_fill(torch.arange(24) < 16, -100)
RANK = 4


@contextmanager
def kept(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """The tensors that autograd keeps, by storage, without parameters."""
    tensors: dict[int, Tensor] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in parameters:
            tensors[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield tensors


def size(tensors: dict[int, Tensor]) -> int:
    """Bytes, without the routers' vector per row, which is negligible in models of realistic size."""
    sizes = [tensor.untyped_storage().nbytes() for tensor in tensors.values()]
    return sum(each for each in sizes if each > 8 * 32 * 4)


def model_of(config: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    model = get_peft_model(ARCHITECTURES["llama"]().to(dtype), config).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def kept_in_a_pass(model: Any, **settings: Any) -> dict[int, Tensor]:
    with kept(model) as tensors:
        loss = model(input_ids=INPUT_IDS, labels=LABELS, **settings).loss
    assert loss.requires_grad
    return tensors


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_less_is_kept_than_lora_keeps(top_k: int, dtype: torch.dtype) -> None:
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    milora = MiLoraConfig(r=RANK, top_k=top_k, pooler="last")
    ours = size(kept_in_a_pass(model_of(milora, dtype)))
    theirs = size(kept_in_a_pass(model_of(lora, dtype)))
    # With one dtype, LoRA too keeps inputs unchanged.
    assert ours < theirs if dtype == torch.bfloat16 else ours <= theirs


def test_inputs_are_kept_as_they_came_and_once_for_all_that_share_them() -> None:
    model = model_of(MiLoraConfig(r=RANK, top_k=7, pooler="last"))
    experts = [tensor for tensor in kept_in_a_pass(model).values() if tensor.shape == (8, 24, 32)]
    # Per block: the inputs of query, key and value, of the output projection, and of gate and up. The float32 tensors
    # are kept by the norms, not by experts.
    in_bf16 = [tensor for tensor in experts if tensor.dtype == torch.bfloat16]
    assert len(in_bf16) <= 3 * 2 + 2


def test_rows_that_did_not_choose_an_expert_keep_nothing_of_it() -> None:
    model = model_of(MiLoraConfig(r=RANK, top_k=1))
    like = model.eval().route(INPUT_IDS)
    model.train()
    gates = torch.zeros_like(like.gates)
    column = like.experts.index("mlp.up_proj")
    gates[:, :3, column] = 1
    tensors = kept_in_a_pass_under(model, Route(gates, like.probabilities, like.experts, like.blocks))
    narrow = [tensor for tensor in tensors.values() if tensor.dim() == 3 and tensor.shape[-1] == RANK]
    assert [tuple(tensor.shape) for tensor in narrow] == [(3, 24, RANK)] * 2


def kept_in_a_pass_under(model: Any, route: Route) -> dict[int, Tensor]:
    with model.use_route(route):
        return kept_in_a_pass(model)
