"""The paged attention against the attention formula, one text at a time."""

import pytest
import torch

from milora_core.kernels.native import library
from milora_core.kernels.paged_attention import PagedAttention

PAGE = 8


def expected(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Attention by its formula in float64; returns (heads, value).

    Shapes: query (heads, key), keys (tokens, groups, key), values (tokens, groups, value).
    """
    shared = query.shape[0] // keys.shape[1]
    keys, values = (part.double().repeat_interleave(shared, dim=1) for part in (keys, values))
    scores = torch.einsum("hd,thd->ht", query.double(), keys) * 0.3
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.einsum("ht,thd->hd", scores.softmax(dim=1), values)


@pytest.mark.skipif(library() is None, reason="no C compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups", "size", "width"), [(9, 3, 64, 64), (4, 1, 24, 40), (2, 2, 256, 80)])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_single_tokens_attend_to_their_texts(
    dtype: torch.dtype, heads: int, groups: int, size: int, width: int, window: int | None, softcap: float | None
) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    lengths = [1, 3, 64, 65, 130, 8]
    pages_of = [-(-length // PAGE) for length in lengths]
    numbers = torch.randperm(sum(pages_of) + 3, generator=generator)
    pages = torch.zeros(len(lengths), max(pages_of), dtype=torch.long)
    used = 0
    for row, count in enumerate(pages_of):
        pages[row, :count] = numbers[used : used + count]
        used += count
    slots_of = [
        (pages[row, : pages_of[row], None] * PAGE + torch.arange(PAGE)).flatten()[:length]
        for row, length in enumerate(lengths)
    ]
    chunk = numbers[used] * PAGE + torch.arange(2)  # Two prompt tokens that are only stored.
    slots = torch.cat([torch.stack([of_row[-1] for of_row in slots_of]), chunk])
    keys, values = random(len(numbers) * PAGE, groups, size), random(len(numbers) * PAGE, groups, width)
    untouched = torch.ones(len(keys), dtype=torch.bool)
    untouched[torch.cat([slots, *slots_of])] = False
    keys[untouched] = values[untouched] = float("nan")  # Other slots must not be read.
    query, key, value = (
        random(len(slots), count, of_size).transpose(0, 1)
        for count, of_size in ((heads, size), (groups, size), (groups, width))
    )
    attention = PagedAttention(slots, torch.tensor(lengths), pages, PAGE)
    assert PagedAttention.serves(keys, values, heads)
    found = attention.attend(keys, values, query, key, value, scaling=0.3, window=window, softcap=softcap)
    assert torch.equal(keys[slots], key.transpose(0, 1))
    assert torch.equal(values[slots], value.transpose(0, 1))
    for row, of_row in enumerate(slots_of):
        seen = of_row if window is None else of_row[-window:]
        right = expected(query[:, row], keys[seen], values[seen], softcap)
        tolerance = 2e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found[row].double(), right, atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(library() is None, reason="no C compiler")
def test_nan_stays_in_its_row() -> None:
    keys, values = torch.randn(4 * PAGE, 1, 16), torch.randn(4 * PAGE, 1, 16)
    keys[PAGE + 1] = float("nan")
    attention = PagedAttention(torch.tensor([3, PAGE + 3]), torch.tensor([4, 4]), torch.tensor([[0], [1]]), PAGE)
    new = torch.randn(1, 2, 16)
    found = attention.attend(keys, values, new, new, new, scaling=1.0)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()
