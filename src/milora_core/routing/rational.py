"""The router's activation: a learnable rational function, and the fixed functions it can be fitted to."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from milora_core.errors import MiLoraError
from milora_core.kernels import routing as kernels
from milora_core.routing.precision import KeepFloat32

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}
"""The fixed activations by name; a rational can be initialised to any of them."""

FIT_INTERVAL = 3.0
"""The fit covers [-3, 3], the range of pooled and normalised hidden states. Outside, the rational may drift."""


@lru_cache(maxsize=32)
def fit_rational(target: str, orders: tuple[int, int]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Least-squares coefficients of `P(x) / (1 + |Q(x)|)` for a fixed activation on [-3, 3].

    The problem is linearised as `P(x) - f(x) s(x) Q(x) = f(x)`, where `s` is the sign of `Q` in the previous step. Each
    step is weighted by the denominator of the previous step (Sanathanan and Koerner 1963), so the residual approaches
    that of the rational itself. The fit starts once from a `Q` without a sign change and once from a `Q` with a sign
    change at 0, and the best step is kept, because the iteration may cycle where `Q` changes its sign.

    Args:
        target: One of [`ACTIVATIONS`].
        orders: Degrees `(m, n)` of numerator and denominator.

    Returns:
        `a_0..a_m` and `b_1..b_n`, ascending.
    """
    degree, order = orders
    # An explicit device: PEFT may be building the tuner with the meta device as the default one.
    x = torch.linspace(-FIT_INTERVAL, FIT_INTERVAL, 1201, dtype=torch.float64, device="cpu")
    y = ACTIVATIONS[target](x)
    powers = torch.stack([x**j for j in range(max(degree, order) + 1)], dim=1)
    numerator_powers, denominator_powers = powers[:, : degree + 1], powers[:, 1 : order + 1]
    best_error, best = float("inf"), torch.zeros(degree + 1 + order, dtype=torch.float64, device="cpu")
    for sign in (torch.ones_like(x), torch.where(x < 0, -1.0, 1.0).to(x)):
        weight = torch.ones_like(x)
        for _ in range(50):
            system = torch.cat([numerator_powers, -(y * sign)[:, None] * denominator_powers], dim=1) * weight[:, None]
            solution = torch.linalg.lstsq(system, (y * weight)[:, None], driver="gelsd").solution[:, 0]
            inner = denominator_powers @ solution[degree + 1 :]
            denominator = 1 + inner.abs()
            error = (numerator_powers @ solution[: degree + 1] / denominator - y).abs().max().item()
            if error < best_error:
                best_error, best = error, solution
            sign = torch.where(inner < 0, -1.0, 1.0).to(x)
            weight = 1 / denominator
    return tuple(best[: degree + 1].tolist()), tuple(best[degree + 1 :].tolist())


class RationalActivation(KeepFloat32):
    """A learnable rational function, applied elementwise (equation 6 of the MiLoRA paper).

    `g(x) = sum_{j=0..m} a_j x^j / (1 + |sum_{i=1..n} b_i x^i|)`

    Args:
        orders: Degrees `(m, n)`, at least 1 each; the paper's are (6, 5).
        target: The activation that it approximates initially, one of [`ACTIVATIONS`].

    Attributes:
        numerator: `a_0..a_m`, shape (m + 1), float32.
        denominator: `b_1..b_n`, shape (n), float32.

    Raises:
        MiLoraError: If an order is below 1 or the target is unknown.
    """

    def __init__(self, orders: tuple[int, int] = (6, 5), target: str = "gelu") -> None:
        super().__init__()
        if len(orders) != 2 or any(not isinstance(order, int) or order < 1 for order in orders):
            raise MiLoraError(f"rational_orders must be two integers of at least 1, such as (6, 5); found {orders!r}.")
        if target not in ACTIVATIONS:
            raise MiLoraError(f"A rational activation can start from {sorted(ACTIVATIONS)}; found {target!r}.")
        numerator, denominator = fit_rational(target, (orders[0], orders[1]))
        self.numerator = nn.Parameter(torch.tensor(numerator, dtype=torch.float32))
        self.denominator = nn.Parameter(torch.tensor(denominator, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape in, the same shape out, float32."""
        x = x.float()
        value = kernels.rational(x, self.numerator, self.denominator)
        if value is not None:
            return value
        return _horner(x, self.numerator) / (1 + (x * _horner(x, self.denominator)).abs())


class FixedActivation(KeepFloat32):
    """One of [`ACTIVATIONS`] as a module without parameters (the paper's ablations MiLoRA-3 to MiLoRA-5)."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Any shape in, the same shape out, float32."""
        return ACTIVATIONS[self.name](x.float())

    def extra_repr(self) -> str:
        """The activation's name."""
        return self.name


def build_activation(name: str, orders: tuple[int, int] = (6, 5)) -> RationalActivation | FixedActivation:
    """Builds the activation that a configuration names.

    Args:
        name: `rational` (initialised to GeLU), `rational-relu` or another initialisation after the hyphen, or one of
            [`ACTIVATIONS`], fixed.
        orders: Degrees of the rational; ignored by the fixed ones.

    Raises:
        MiLoraError: If the name is unknown.
    """
    kind, _, target = name.partition("-")
    if kind == "rational":
        return RationalActivation(orders, target or "gelu")
    if name not in ACTIVATIONS:
        raise MiLoraError(f"Unknown router_activation {name!r}; choose one of {sorted([*ACTIVATIONS, 'rational'])}.")
    return FixedActivation(name)


def _horner(x: Tensor, coefficients: Tensor) -> Tensor:
    value = torch.zeros_like(x)
    for coefficient in reversed(coefficients.float().unbind()):
        value = value * x + coefficient
    return value
