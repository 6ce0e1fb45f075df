"""Poolers ignore padding: its contents, its place and its amount."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from milora import MiLoraError
from milora_core.routing import POOLERS, Pooler, build_pooler
from milora_core.routing.pooling import AttentionPooler

HIDDEN = 6
GARBAGE = (float("nan"), float("inf"), float("-inf"), 1e30, -1e30, 0.0)


def pooler_of(name: str) -> Pooler:
    pooler = build_pooler(name, HIDDEN)
    if isinstance(pooler, AttentionPooler):
        pooler.weight.data = torch.linspace(-1, 1, HIDDEN)[None]
    return pooler


@st.composite
def padded(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A batch with garbage at padding, its mask, and each prompt without padding."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    width = max(lengths) + draw(st.integers(0, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    prompts = [torch.randn(length, HIDDEN, generator=generator) for length in lengths]
    hidden = torch.full((len(lengths), width, HIDDEN), draw(st.sampled_from(GARBAGE)))
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        # Tokens stay in order, with gaps: padding can be left, right, or in between.
        places = sorted(draw(st.permutations(range(width)))[: len(prompt)])
        hidden[row, places] = prompt
        mask[row, places] = True
    return hidden, mask, prompts


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", POOLERS)
@given(batch=padded())
def test_padding_never_enters(name: str, normalize: bool, batch: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    hidden, mask, prompts = batch
    pooler = pooler_of(name)
    pooled = pooler(hidden, mask, normalize=normalize)
    for row, prompt in enumerate(prompts):
        alone = pooler(prompt[None], torch.ones(1, len(prompt), dtype=torch.bool), normalize=normalize)[0]
        torch.testing.assert_close(pooled[row], alone)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", POOLERS)
def test_no_gradient_goes_to_padding(name: str, normalize: bool) -> None:
    hidden = torch.randn(2, 4, HIDDEN)
    hidden[0, 0] = float("nan")
    hidden.requires_grad_()
    mask = torch.tensor([[False, True, True, True], [True, True, False, False]])
    pooler_of(name)(hidden, mask, normalize=normalize).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
    assert not hidden.grad[~mask].any()
    assert hidden.grad[mask].any()


@pytest.mark.parametrize("name", POOLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_token_is_itself_in_float32(name: str, dtype: torch.dtype) -> None:
    token = torch.randn(1, 1, HIDDEN).to(dtype)
    pooled = pooler_of(name)(token, torch.ones(1, 1, dtype=torch.bool))
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, token[:, 0].float())


def test_attention_by_hand() -> None:
    pooler = AttentionPooler(2)
    hidden = torch.tensor([[[0.0, 4.0], [9.0, 9.0], [2.0, 0.0], [1.0, 2.0]]])
    mask = torch.tensor([[True, False, True, True]])
    # With zero weights it is the mean.
    torch.testing.assert_close(pooler(hidden, mask), torch.tensor([[1.0, 2.0]]))
    pooler.weight.data = torch.tensor([[math.log(2), 0.0]])
    # Scores 0, 2 ln 2 and ln 2: weights 1/7, 4/7 and 2/7.
    torch.testing.assert_close(pooler(hidden, mask), torch.tensor([[10 / 7, 8 / 7]]))


def test_large_scores_do_not_overflow() -> None:
    pooler = AttentionPooler(1)
    pooler.weight.data.fill_(1e4)
    pooled = pooler(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(pooled, torch.tensor([[3.0]]))


def test_max_and_last_by_hand() -> None:
    hidden = torch.tensor([[[5.0, -1.0], [-3.0, -2.0], [-4.0, -9.0], [7.0, 7.0]]])
    mask = torch.tensor([[False, True, True, False]])
    assert build_pooler("max", 2)(hidden, mask).tolist() == [[-3.0, -2.0]]
    assert build_pooler("last", 2)(hidden, mask).tolist() == [[-4.0, -9.0]]


@pytest.mark.parametrize("name", POOLERS)
def test_tokens_divided_by_their_root_mean_square_by_hand(name: str) -> None:
    # Root mean squares 5 / sqrt(2), 500 / sqrt(2) and 1; the second token is a hundred times as long.
    hidden = torch.tensor([[[3.0, -4.0], [400.0, 300.0], [9.0, 9.0], [1.0, 1.0]]])
    mask = torch.tensor([[True, True, False, True]])
    s = 2**0.5 / 5
    mean = [(3 * s + 4 * s + 1) / 3, (-4 * s + 3 * s + 1) / 3]
    expected = {"attention": mean, "mean": mean, "max": [4 * s, 1.0], "last": [1.0, 1.0]}[name]
    # With zero weights the attention pooler is the mean.
    pooled = build_pooler(name, 2)(hidden, mask, normalize=True)
    torch.testing.assert_close(pooled, torch.tensor([expected]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", POOLERS)
@given(scales=st.lists(st.floats(0.1, 1e4), min_size=5, max_size=5), seed=st.integers(0, 2**31))
def test_the_length_of_a_token_does_not_matter_when_normalised(name: str, scales: list[float], seed: int) -> None:
    hidden = torch.randn(1, 5, HIDDEN, generator=torch.Generator().manual_seed(seed))
    mask, pooler = torch.ones(1, 5, dtype=torch.bool), pooler_of(name)
    longer = hidden * torch.tensor(scales)[None, :, None]
    pooled = pooler(hidden, mask, normalize=True)
    torch.testing.assert_close(pooler(longer, mask, normalize=True), pooled, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", POOLERS)
def test_the_center_is_the_running_mean_of_earlier_batches(name: str) -> None:
    pooler = build_pooler(name, 2, centered=True)
    first, second = torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.tensor([[12.0, 1.0]])
    assert torch.equal(pooler.centered(first, learn=False), first)
    # The first batch sets the center: (2, 1).
    assert torch.equal(pooler.centered(first, learn=True), torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    # The second batch is centered by it, and moves it by a tenth.
    assert torch.equal(pooler.centered(second, learn=True), torch.tensor([[10.0, 0.0]]))
    torch.testing.assert_close(pooler.centered(second, learn=False), torch.tensor([[9.0, 0.0]]))
    assert pooler.to(torch.bfloat16).center.dtype == torch.float32
    assert build_pooler(name, 2).center is None


def test_an_unknown_name() -> None:
    with pytest.raises(MiLoraError, match=r"Unknown pooler 'median'; choose one of \['attention'"):
        build_pooler("median", 2)
