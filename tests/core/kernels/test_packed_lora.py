"""The LoRA of packed passes against the formula, one token at a time."""

import random as python_random

import pytest
import torch

from milora_core.kernels.native import library
from milora_core.kernels.packed_lora import PackedLora, PackedModule

RANKS = (4, 16, 5, 4, 5)


@pytest.mark.skipif(library() is None, reason="no C compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_each_token_gets_its_adapter_and_gate(dtype: torch.dtype, has_bias: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    d_in, d_out, columns = 40, 72, 3
    bias = random(d_out) if has_bias else None
    weights = {}
    modules = [PackedModule(8, column, (d_in, d_out), dtype, bias) for column in range(columns)]
    for column, module in enumerate(modules):
        for number, rank in enumerate(RANKS):
            if (number + column) % 4 == 3:
                continue  # Not adapted in this module.
            a, wide = random(rank, d_in), random(d_out, rank + 3)
            factors = torch.rand(d_out, generator=generator) + 0.5 if number == 2 else None
            weights[column, number] = a, wide[:, :rank], factors
            assert module.set(number, a, wide[:, :rank], 0.5 + number, factors)
    numbers = [0, 0, 0, 1, 2, 2, 3, 4, 6]  # Number 6 has no adapter at all.
    # The 300 tokens need several pieces. The other chunks are shorter than a group of rows, as long, or longer.
    counts = [1, 3, 300, 4, 1, 70, 5, 1, 9]
    order = python_random.Random(seed).sample(range(len(counts)), len(counts))
    firsts = {row: 1 + sum(counts[other] + 1 for other in order[:place]) for place, row in enumerate(order)}
    spans = [(firsts[row], count) for row, count in enumerate(counts)]
    places = 1 + sum(count + 1 for count in counts)
    gates = torch.rand(len(numbers), columns, generator=generator)
    gates[torch.rand(len(numbers), columns, generator=generator) < 0.4] = 0
    packed = PackedLora(spans, numbers, gates, max(RANKS))
    for column, module in enumerate(modules):
        x, result = random(places, d_in), random(places, d_out)
        expected = result.double()
        tokens = [
            (token, row, number)
            for row, ((first, count), number) in enumerate(zip(spans, numbers, strict=True))
            for token in range(first, first + count)
        ]
        for token, row, number in tokens:
            if (column, number) in weights:
                a, b, factors = weights[column, number]
                change = (0.5 + number) * (b.double() @ (a.double() @ x[token].double()))
                if factors is not None:
                    bare = expected[token] - (0 if bias is None else bias.double())
                    change = (factors.double() - 1) * bare + factors.double() * change
                expected[token] += float(gates[row, column]) * change
        assert packed.add_to(module, result, x)
        tolerance = 1e-4 if dtype == torch.float32 else 0.2
        torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=1e-2)


@pytest.mark.skipif(library() is None, reason="no C compiler")
def test_weights_and_tensors_that_do_not_fit_are_left_to_others() -> None:
    module = PackedModule(2, 0, (8, 4), torch.float32, None)
    assert not module.set(0, torch.randn(2, 8).double(), torch.randn(4, 2).double(), 1.0)
    assert not module.set(0, torch.randn(8, 2).T, torch.randn(4, 2), 1.0)
    assert not module.set(0, torch.randn(2, 6), torch.randn(4, 2), 1.0)
    assert module.set(0, torch.randn(2, 8), torch.randn(4, 2), 1.0)
    packed = PackedLora([(0, 3)], [0], torch.ones(1, 1), 2)
    assert packed.add_to(module, torch.zeros(3, 4), torch.randn(3, 8))
    assert not packed.add_to(module, torch.zeros(2, 4), torch.randn(2, 8))  # Too few tokens.
    assert not packed.add_to(module, torch.zeros(3, 4).double(), torch.randn(3, 8))
    assert not packed.add_to(module, torch.zeros(3, 4), torch.randn(8, 3).T)
    before = torch.zeros(3, 4)
    module.clear(0)
    assert packed.add_to(module, before, torch.randn(3, 8))
    assert not before.any()
