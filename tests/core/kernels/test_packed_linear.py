"""Linear layers with packed weights against torch's own."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

from milora_core.kernels.packed_linear import PackedLinear, has_packed_linear


def test_the_private_operators_are_where_they_were() -> None:
    """As in torch 2.13's CPU builds. If this fails, look at the names in packed_linear.py."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    assert has_packed_linear()


@pytest.mark.skipif(not has_packed_linear(), reason="no packed products here")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 24), (1, 5, 24), (40, 24), (2, 33, 24)])
def test_products_are_torchs(dtype: torch.dtype, tolerance: float, bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 40, bias=bias).to(dtype)
    x = torch.randn(shape).to(dtype)
    assert PackedLinear.serves(linear)
    with torch.inference_mode():
        expected = linear(x)
        PackedLinear.pack(linear)
        torch.testing.assert_close(linear(x), expected, atol=tolerance, rtol=tolerance)
        PackedLinear.unpack(linear)
        assert type(linear) is torch.nn.Linear
        assert torch.equal(linear(x), expected)


@pytest.mark.skipif(not has_packed_linear(), reason="no packed products here")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_use_their_own_weights(copied: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    """PEFT copies a module that an adapter saves whole, then trains or loads the copy."""
    linear, x = torch.nn.Linear(8, 8), torch.randn(2, 8)
    PackedLinear.pack(linear)
    other = copied(linear)
    with torch.no_grad():
        torch.testing.assert_close(other(x), linear(x))
        other.weight.mul_(2)
        other.bias.mul_(2)
        torch.testing.assert_close(other(x), 2 * linear(x))


def test_other_modules_are_left_alone() -> None:
    class Own(torch.nn.Linear):
        pass

    assert not PackedLinear.serves(Own(4, 4))
    assert not PackedLinear.serves(torch.nn.Linear(4, 4).double())
    assert not PackedLinear.serves(torch.nn.Linear(4, 4, device="meta"))
    assert not PackedLinear.serves(torch.nn.LayerNorm(4))
