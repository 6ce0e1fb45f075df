"""The router's native kernels against the formulas in float64, and the cases that they leave to torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from milora_core.kernels import native
from milora_core.kernels.routing import pool, rational
from milora_core.routing import POOLERS, ROUTER_NORMS, Router, build_activation, build_pooler

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C compiler here")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def pooled_by_hand(hidden: Tensor, mask: Tensor, weight: Tensor | None, *, normalize: bool = False) -> Tensor:
    """Pools one prompt at a time, over its own tokens only."""
    rows = []
    for of_prompt, of_mask in zip(hidden.double(), mask, strict=True):
        tokens = [token for token, keep in zip(of_prompt, of_mask.tolist(), strict=True) if keep]
        if normalize:
            tokens = [token / math.sqrt(math.fsum((token**2).tolist()) / len(token) + 1e-6) for token in tokens]
        scores = [0.0 if weight is None else math.fsum((token * weight.double()).tolist()) for token in tokens]
        shares = [math.exp(score - max(scores)) for score in scores]
        rows.append(sum(share / math.fsum(shares) * token for share, token in zip(shares, tokens, strict=True)))
    return torch.stack(rows)  # type: ignore[arg-type]


@st.composite
def prompts(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None]:
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    size = draw(st.sampled_from([1, 5, 31, 32, 64, 255, 256, 300, 513]))
    mask = torch.tensor(
        [draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens).filter(any)) for _ in range(batch)]
    )
    hidden = normal(batch, tokens, size, dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])))
    # Values outside a prompt can be anything.
    hidden[~mask] = draw(st.sampled_from([0.0, 7.0, math.nan, math.inf]))
    weight = normal(size, seed=1) * draw(st.sampled_from([0.0, 0.1, 3.0]))
    return hidden, mask, weight if draw(st.booleans()) else None


@settings(deadline=None, max_examples=150)
@given(prompts(), st.booleans())
def test_pooling_is_the_formula_over_each_prompts_own_tokens(
    case: tuple[Tensor, Tensor, Tensor | None], normalize: bool
) -> None:
    pooled = pool(*case, normalize=normalize)
    assert pooled is not None
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.double(), pooled_by_hand(*case, normalize=normalize), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_neither_padding_nor_neighbours_nor_threads_change_a_bit(normalize: bool) -> None:
    prompt, weight = normal(1, 6, 300, dtype=torch.bfloat16), normal(300, seed=3)
    alone = pool(prompt, torch.ones(1, 6, dtype=torch.bool), weight, normalize=normalize)
    assert alone is not None
    left = torch.cat([normal(1, 4, 300, dtype=torch.bfloat16), prompt], dim=1)
    right = torch.cat([prompt, normal(1, 4, 300, dtype=torch.bfloat16)], dim=1)
    keep = torch.tensor([[0] * 4 + [1] * 6, [1] * 6 + [0] * 4], dtype=torch.bool)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            both = pool(torch.cat([left, right]), keep, weight, normalize=normalize)
            assert both is not None
            assert torch.equal(both, alone.expand(2, -1))
    finally:
        torch.set_num_threads(threads)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.floats(-2, 2), min_size=2, max_size=9),
    st.lists(st.floats(-2, 2), min_size=1, max_size=8),
    st.lists(st.floats(-4, 4), max_size=40),
)
def test_the_rational_is_its_formula(numerator: list[float], denominator: list[float], points: list[float]) -> None:
    x, a, b = torch.tensor(points), torch.tensor(numerator), torch.tensor(denominator)
    value = rational(x, a, b)
    assert value is not None
    for at, found in zip(x.double().tolist(), value.tolist(), strict=True):
        terms = [c * at**j for j, c in enumerate(a.double().tolist())]
        inner = [c * at ** (i + 1) for i, c in enumerate(b.double().tolist())]
        below = 1 + abs(math.fsum(inner))
        # Where large terms cancel, the sum has the terms' float32 error.
        lost = 1e-5 * (math.fsum(map(abs, terms)) + math.fsum(map(abs, inner)) * abs(math.fsum(terms)) / below) / below
        assert found == pytest.approx(math.fsum(terms) / below, rel=1e-5, abs=lost + 1e-30)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_nan_in_a_prompt_is_not_hidden(normalize: bool) -> None:
    hidden = normal(1, 4, 32)
    hidden[0, 1, 3] = math.nan
    pooled = pool(hidden, torch.ones(1, 4, dtype=torch.bool), normal(32), normalize=normalize)
    assert pooled is not None
    assert pooled.isnan().all()


@pytest.mark.parametrize("norm", ROUTER_NORMS)
@pytest.mark.parametrize("pooler", POOLERS)
def test_routers_decide_alike_with_torchs_operators(pooler: str, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    router = Router(96, 7, pooler=pooler, norm=norm)
    torch.nn.init.normal_(router.projection.weight, generator=torch.Generator().manual_seed(0))
    if pooler == "attention":
        torch.nn.init.normal_(router.pooler.weight, generator=torch.Generator().manual_seed(1))
    hidden, mask = normal(8, 20, 96), torch.arange(20)[None] >= torch.arange(8)[:, None]
    with torch.no_grad():
        native_decision = router(hidden, mask)
        monkeypatch.setenv("MILORA_NATIVE", "0")
        assert pool(hidden, mask, None) is None
        decision = router(hidden, mask)
    torch.testing.assert_close(native_decision.probabilities, decision.probabilities, rtol=1e-4, atol=1e-6)
    assert torch.equal(native_decision.chosen, decision.chosen)
    assert torch.equal(native_decision.gates, decision.gates)


def test_what_has_a_gradient_is_left_to_torch() -> None:
    hidden, mask = normal(2, 5, 32), torch.ones(2, 5, dtype=torch.bool)
    pooler, activation = build_pooler("attention", 32), build_activation("rational")
    activation(pooler(hidden, mask)).sum().backward()
    assert all(parameter.grad is not None for part in (pooler, activation) for parameter in part.parameters())
    mean = build_pooler("mean", 32)
    mean(hidden.requires_grad_(), mask).sum().backward()
    assert hidden.grad is not None


@pytest.mark.parametrize(
    "hidden",
    [
        pytest.param(normal(2, 5, 32, dtype=torch.float16), id="float16"),
        pytest.param(normal(2, 5, 32).double(), id="float64"),
        pytest.param(normal(2, 5, 64)[..., ::2], id="gaps"),
        pytest.param(torch.empty(2, 5, 32, device="meta"), id="meta"),
    ],
)
def test_what_no_kernel_serves_is_left_to_torch(hidden: Tensor) -> None:
    mask = torch.ones(2, 5, dtype=torch.bool, device=hidden.device)
    assert pool(hidden, mask, None) is None
    pooled = build_pooler("mean", 32)(hidden, mask)
    assert pooled.shape == (2, 32)
    if hidden.device.type != "meta":
        torch.testing.assert_close(pooled, hidden.float().mean(dim=1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("mask", "weight"),
    [
        pytest.param(torch.ones(1, 5, dtype=torch.bool), normal(32), id="a mask that would be broadcast"),
        pytest.param(torch.ones(2, 5), normal(32), id="a mask of numbers"),
        pytest.param(torch.ones(2, 5, dtype=torch.bool), normal(31), id="another size"),
        pytest.param(torch.ones(2, 5, dtype=torch.bool), normal(32).double(), id="another dtype"),
    ],
)
def test_what_does_not_fit_is_left_to_torch(mask: Tensor, weight: Tensor) -> None:
    assert pool(normal(2, 5, 32), mask, weight) is None
    assert pool(normal(10, 32), mask, weight) is None


def test_the_default_dtype_does_not_matter() -> None:
    hidden, mask = normal(2, 5, 32), torch.ones(2, 5, dtype=torch.bool)
    before, activation = torch.get_default_dtype(), build_activation("rational")
    expected = pool(hidden, mask, None)
    torch.set_default_dtype(torch.float64)
    try:
        pooled = pool(hidden, mask, None)
        assert pooled is not None
        assert expected is not None
        assert torch.equal(pooled, expected)
        with torch.no_grad():
            assert activation(pooled).dtype == torch.float32
    finally:
        torch.set_default_dtype(before)
