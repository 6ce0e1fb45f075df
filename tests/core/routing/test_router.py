"""Choosing and weighting k experts; the load-balancing loss; the router alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from milora import MiLoraError, Router
from milora_core.routing import GATES, choose, load_balancing_loss


@st.composite
def probabilities_and_k(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Only a few different values, so ties are common."""
    experts = draw(st.integers(1, 9))
    rows = draw(st.lists(st.lists(st.integers(1, 3), min_size=experts, max_size=experts), min_size=1, max_size=4))
    raw = torch.tensor(rows, dtype=torch.float32)
    return raw / raw.sum(dim=1, keepdim=True), draw(st.integers(1, experts))


@given(case=probabilities_and_k(), gate=st.sampled_from(GATES))
def test_exactly_k_are_chosen_and_ties_go_to_the_lowest_index(case: tuple[Tensor, int], gate: str) -> None:
    probabilities, k = case
    decision = choose(probabilities, k, gate)
    for row, gates, chosen in zip(probabilities.tolist(), decision.gates, decision.chosen.tolist(), strict=True):
        expected = sorted(range(len(row)), key=lambda index: (-row[index], index))[:k]
        assert [index for index, is_chosen in enumerate(chosen) if is_chosen] == sorted(expected)
        assert (gates != 0).tolist() == chosen


@given(case=probabilities_and_k())
def test_gates(case: tuple[Tensor, int]) -> None:
    probabilities, k = case
    hard, softmax, renormalized = (choose(probabilities, k, gate) for gate in ("hard", "softmax", "renormalized"))
    mask = hard.chosen
    assert torch.equal(hard.gates, mask.float())
    assert torch.equal(softmax.gates, probabilities * mask)
    torch.testing.assert_close(renormalized.gates.sum(dim=1), torch.ones(len(probabilities)))
    torch.testing.assert_close(renormalized.gates * softmax.gates.sum(dim=1, keepdim=True), softmax.gates)


@pytest.mark.parametrize("scale", [1e-6, 0.1, 0.3, 0.7])
def test_a_hard_gate_is_exactly_one_with_a_gradient_too(scale: float) -> None:
    probabilities = (torch.rand(50, 7) * scale).requires_grad_()
    gates = choose(probabilities, 3, "hard").gates
    assert set(gates.unique().tolist()) == {0.0, 1.0}


def test_the_straight_through_gradient_by_hand() -> None:
    weights = torch.tensor([5.0, 7.0, 11.0])
    for gate, expected in {
        "hard": [0.0, 7.0, 11.0],
        "softmax": [0.0, 7.0, 11.0],
        # p_i / s with s = 0.9: d/dp_1 = 7 / s - (7 * 0.6 + 11 * 0.3) / s^2, and so on.
        "renormalized": [0.0, 7 / 0.9 - 7.5 / 0.81, 11 / 0.9 - 7.5 / 0.81],
    }.items():
        p = torch.tensor([[0.1, 0.6, 0.3]], requires_grad=True)
        (choose(p, 2, gate).gates * weights).sum().backward()
        assert p.grad is not None
        torch.testing.assert_close(p.grad[0], torch.tensor(expected), msg=gate)


def test_with_all_experts_hard_gates_are_constants() -> None:
    p = torch.rand(3, 4, requires_grad=True)
    gates = choose(p, 4, "hard").gates
    assert torch.equal(gates, torch.ones(3, 4))
    assert not gates.requires_grad


@pytest.mark.parametrize("top_k", [0, -1, 8])
def test_top_k_out_of_range(top_k: int) -> None:
    with pytest.raises(MiLoraError, match=f"between 1 and the number of experts of a block, 7; found {top_k}"):
        choose(torch.rand(2, 7), top_k)


def test_an_unknown_gate() -> None:
    with pytest.raises(MiLoraError, match="Unknown gate 'soft'"):
        choose(torch.rand(2, 7), 2, "soft")


@given(case=probabilities_and_k())
def test_the_balance_loss_lies_between_its_bounds(case: tuple[Tensor, int]) -> None:
    probabilities, _ = case
    experts = probabilities.shape[1]
    loss = load_balancing_loss(probabilities).item()
    # Each winner's p is at least 1 / N, so sum f p > 0; and sum f p is at most 1.
    assert 0 < loss <= experts + 1e-5


def test_the_balance_loss_by_hand() -> None:
    # Arg max: 0 (a tie), 0, 1. f = (2/3, 1/3), p = (0.5, 0.5).
    rows = torch.tensor([[0.5, 0.5], [0.8, 0.2], [0.2, 0.8]], requires_grad=True)
    loss = load_balancing_loss(rows)
    torch.testing.assert_close(loss, torch.tensor(1.0))
    loss.backward()
    # N f_i / rows: the shares are constants.
    torch.testing.assert_close(rows.grad, torch.tensor([[4 / 9, 2 / 9]] * 3))
    torch.testing.assert_close(load_balancing_loss(torch.tensor([[0.9, 0.1]] * 4)), torch.tensor(1.8))
    torch.testing.assert_close(load_balancing_loss(torch.eye(5)), torch.tensor(1.0))
    torch.testing.assert_close(load_balancing_loss(torch.eye(5)[:1].repeat(3, 1)), torch.tensor(5.0))


def test_the_balance_loss_is_float32() -> None:
    assert load_balancing_loss(torch.eye(3, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    ("norm", "first"),
    [
        # The mean of the tokens is (3, -4); relu keeps the first feature.
        ("none", 3.0),
        # The root mean square of (3, -4) is 5 / sqrt(2).
        ("pooled", 3 / (5 / 2**0.5)),
        # The tokens' root mean squares are 10 / sqrt(2), and 0 for the zero token.
        ("tokens", 3 / (10 / 2**0.5)),
    ],
)
def test_a_router_by_hand(norm: str, first: float) -> None:
    router = Router(2, 3, top_k=2, pooler="mean", activation="relu", norm=norm)
    router.projection.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    hidden = torch.tensor([[[9.0, 9.0], [6.0, -8.0], [0.0, 0.0]]])
    mask = torch.tensor([[False, True, True]])
    decision = router(hidden, mask)
    expected = torch.tensor([[first, 0.0, first / 2]]).softmax(dim=1)
    torch.testing.assert_close(decision.probabilities, expected, rtol=1e-5, atol=1e-6)
    assert decision.gates.tolist() == [[1.0, 0.0, 1.0]]


def test_a_router_computes_in_float32_under_autocast_and_casts() -> None:
    router = Router(8, 4, top_k=2)
    hidden, mask = torch.randn(3, 5, 8).bfloat16(), torch.ones(3, 5, dtype=torch.bool)
    plain = router(hidden.float(), mask)
    router.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        cast = router(hidden, mask)
    assert cast.probabilities.dtype == torch.float32
    assert torch.equal(cast.probabilities, plain.probabilities)
    assert all(parameter.dtype == torch.float32 for parameter in router.parameters())


def test_a_router_refuses_what_it_cannot_do() -> None:
    with pytest.raises(MiLoraError, match="top_k"):
        Router(8, 4, top_k=5)
    with pytest.raises(MiLoraError, match="Unknown gate"):
        Router(8, 4, top_k=2, gate="soft")
    with pytest.raises(MiLoraError, match=r"Unknown router_norm 'token'; choose one of \['centered', "):
        Router(8, 4, top_k=2, norm="token")


def test_a_long_first_token_does_not_decide_alone_by_default() -> None:
    """As in pretrained models: every prompt starts with the same token, whose norm is hundreds of times the others'."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(16, 12, 32, generator=generator)
    prompts[:, 0] = 300 * torch.randn(32, generator=generator)
    mask = torch.ones(16, 12, dtype=torch.bool)
    torch.manual_seed(0)
    blind, reading = Router(32, 7, norm="none"), Router(32, 7)
    blind.projection = reading.projection
    routes = [{tuple(row) for row in router(prompts, mask).chosen.tolist()} for router in (blind, reading)]
    assert len(routes[0]) == 1
    assert len(routes[1]) > 4
    # One-hot probabilities have no gradient.
    assert blind(prompts, mask).probabilities.amax(dim=1).min() > 0.99
    assert reading(prompts, mask).probabilities.amax(dim=1).max() < 0.5


def test_a_center_leaves_what_prompts_differ_in() -> None:
    """The prompts' pooled vectors are nearly the same, as in pretrained models."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(32, 12, 32, generator=generator) + 3 * torch.randn(32, generator=generator)
    mask = torch.ones(32, 12, dtype=torch.bool)
    torch.manual_seed(0)
    plain, centered = Router(32, 7, norm="tokens"), Router(32, 7, norm="centered")
    centered.projection = plain.projection
    centered(prompts[:16], mask[:16])
    routes = [
        {tuple(row) for row in router.eval()(prompts[16:], mask[16:]).chosen.tolist()} for router in (plain, centered)
    ]
    assert len(routes[0]) <= 3
    assert len(routes[1]) >= 8


def test_a_center_moves_only_where_its_router_learns() -> None:
    router = Router(8, 4, top_k=2, norm="centered")
    hidden, mask = torch.randn(3, 5, 8), torch.ones(3, 5, dtype=torch.bool)
    with torch.no_grad():
        router(hidden, mask)
    router.eval()(hidden, mask)
    router.train().projection.requires_grad_(False)
    router(hidden, mask)
    assert not router.pooler.center.any()
    router.projection.requires_grad_(True)
    router(hidden, mask)
    assert router.pooler.center.any()
