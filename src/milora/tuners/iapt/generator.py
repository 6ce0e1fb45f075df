"""Computes a layer's soft tokens from a prompt."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from milora_core.routing.rational import RationalActivation

UP_SPREAD = 0.02
"""Standard deviation that the up-projection starts with."""


class SoftTokenGenerator(nn.Module):
    """`Z = H D^T`, `A = softmax over the prompt's tokens of Z P^T`, `soft tokens = g(A^T Z) U^T`, without biases.

    `g` is a learnable rational function that starts as GeLU.

    Args:
        size: Length d of the hidden states.
        bottleneck: Length r of what is in between.
        tokens: Number t of soft tokens.
        orders: Degrees of the rational.

    Attributes:
        down: `D`, (r, d).
        pooler: `P`, (t, r), a query for each soft token.
        activation: `g`.
        up: `U`, (d, r).
    """

    def __init__(self, size: int, bottleneck: int, tokens: int, orders: tuple[int, int]) -> None:
        super().__init__()
        # Parameters and no `nn.Linear`s: those would be found among the block's own linear modules.
        self.down = nn.Parameter(torch.empty(bottleneck, size))
        self.pooler = nn.Parameter(torch.empty(tokens, bottleneck))
        self.activation = RationalActivation(orders)
        self.up = nn.Parameter(torch.empty(size, bottleneck))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gives the matrices values to start from."""
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        # Not zero: equal soft tokens would stay equal.
        nn.init.normal_(self.pooler, std=self.pooler.shape[1] ** -0.5)
        # Small, and not at zero: the block's norm follows, whose slope at zero is the inverse of its epsilon's root, so
        # that the first step would throw the soft tokens from nothing to full length.
        nn.init.normal_(self.up, std=UP_SPREAD)

    def forward(self, hidden: Tensor, prompt: Tensor) -> Tensor:
        """The soft tokens, (batch, t, d), in the parameters' type.

        Args:
            hidden: (batch, tokens, d), in any floating-point type.
            prompt: (batch, tokens), bool: the tokens of the prompts, at least one a row.
        """
        outside = ~prompt.unsqueeze(-1)
        # Zeroed and not only weighted by zero: what lies at padding may be NaN, and 0 * NaN is NaN.
        between = functional.linear(hidden.to(self.down.dtype).masked_fill(outside, 0.0), self.down)
        scores = functional.linear(between, self.pooler).float().masked_fill(outside, float("-inf"))
        pooled = torch.einsum("bnt,bnr->btr", scores.softmax(dim=1).to(between.dtype), between)
        return functional.linear(self.activation(pooled).to(self.up.dtype), self.up)
