"""The rational activation: quality of its initial fit, formula, gradients, and that it stays in float32."""

import pytest
import torch
from torch import nn

from milora import MiLoraError
from milora_core.routing import ACTIVATIONS, RationalActivation, build_activation
from milora_core.routing.rational import fit_rational


@pytest.mark.parametrize(
    ("target", "orders", "largest_error"),
    [
        ("gelu", (6, 5), 2e-4),
        ("silu", (6, 5), 2e-4),
        ("tanh", (6, 5), 2e-3),
        ("relu", (6, 5), 6e-2),
        ("identity", (6, 5), 1e-5),
        ("identity", (1, 1), 1e-5),
        ("gelu", (5, 4), 6e-3),
        ("gelu", (3, 2), 5e-2),
        # The best fit has a denominator that changes sign.
        ("gelu", (2, 4), 5e-2),
    ],
)
def test_it_starts_close_to_its_target(target: str, orders: tuple[int, int], largest_error: float) -> None:
    activation = RationalActivation(orders, target)
    assert activation.numerator.shape == (orders[0] + 1,)
    assert activation.denominator.shape == (orders[1],)
    # Points that the fit did not use.
    x = torch.linspace(-3, 3, 4999)
    assert (activation(x) - ACTIVATIONS[target](x)).abs().max() <= largest_error


def test_the_formula_by_hand() -> None:
    activation = RationalActivation((2, 2))
    activation.numerator.data = torch.tensor([1.0, 2.0, 3.0])
    activation.denominator.data = torch.tensor([1.0, -2.0])
    # x = 2: (1 + 4 + 12) / (1 + |2 - 8|); x = -1: (1 - 2 + 3) / (1 + |-1 - 2|); x = 0: a_0.
    torch.testing.assert_close(activation(torch.tensor([[2.0], [-1.0], [0.0]])), torch.tensor([[17 / 7], [0.5], [1.0]]))


def test_its_gradients_are_those_of_the_formula() -> None:
    activation = RationalActivation()
    coefficients = (*activation.numerator.detach().double(), *activation.denominator.detach().double())

    def formula(x: torch.Tensor, *c: torch.Tensor) -> torch.Tensor:
        above = sum(a * x**j for j, a in enumerate(c[:7]))
        below = sum(b * x**i for i, b in enumerate(c[7:], start=1))
        return (above / (1 + below.abs())).sum()

    x = torch.tensor([-2.3, -0.4, 0.7, 1.9], requires_grad=True)
    activation(x).sum().backward()
    leaves = [leaf.detach().requires_grad_() for leaf in (x.double(), *coefficients)]
    formula(*leaves).backward()
    found = (x.grad, *activation.numerator.grad, *activation.denominator.grad)  # type: ignore[misc]
    for gradient, leaf in zip(found, leaves, strict=True):
        torch.testing.assert_close(gradient.double(), leaf.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "to", "double"])
def test_coefficients_stay_in_float32_unrounded(cast: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), RationalActivation())
    before = [parameter.detach().clone() for parameter in model[1].parameters()]
    _ = model.to(torch.bfloat16) if cast == "to" else getattr(model, cast)()
    assert model[0].weight.dtype != torch.float32
    for parameter, old in zip(model[1].parameters(), before, strict=True):
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, old)


def test_autocast_and_narrow_inputs_compute_in_float32() -> None:
    activation = RationalActivation()
    x = torch.linspace(-3, 3, 101).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = activation(x)
    assert value.dtype == torch.float32
    assert torch.equal(value, activation(x.float()))


def test_it_can_be_built_while_the_meta_device_is_the_default() -> None:
    fit_rational.cache_clear()
    with torch.device("meta"):
        assert RationalActivation((3, 3)).numerator.is_meta
    # The cached fit is a real tensor, even if it was computed under the meta device.
    assert torch.equal(RationalActivation((3, 3)).numerator, torch.tensor(fit_rational("gelu", (3, 3))[0]))


def test_names() -> None:
    assert isinstance(build_activation("rational"), RationalActivation)
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(build_activation("rational-silu")(x), ACTIVATIONS["silu"](x), atol=1e-3, rtol=0)
    for name, function in ACTIVATIONS.items():
        activation = build_activation(name)
        assert not list(activation.parameters())
        assert torch.equal(activation(x), function(x))


@pytest.mark.parametrize("name", ["swish", "rational-swish", "rationally"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(MiLoraError, match=name.removeprefix("rational-")):
        build_activation(name)


@pytest.mark.parametrize("orders", [(0, 5), (6, 0), (6,), (6, 5, 4), (6.0, 5)])
def test_orders_out_of_range(orders: tuple[int, int]) -> None:
    with pytest.raises(MiLoraError, match="two integers of at least 1"):
        RationalActivation(orders)
