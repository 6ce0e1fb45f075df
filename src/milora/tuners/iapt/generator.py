"""Computes a layer's soft tokens from a prompt."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from milora_core.routing.rational import RationalActivation

UP_SPREAD = 0.02
"""Initial standard deviation of the up-projection."""


class SoftTokenGenerator(nn.Module):
    """`Z = H D^T`, `A = softmax over the prompt's tokens of Z P^T`, `soft tokens = g(A^T Z) U^T`, without biases.

    `g` is a learnable rational function that starts as GeLU.

    Args:
        size: Size d of the hidden states.
        bottleneck: Size r of the bottleneck.
        tokens: Number t of soft tokens.
        orders: Degrees of the rational function's numerator and denominator.

    Attributes:
        down: `D`, (r, d).
        pooler: `P`, (t, r), a query for each soft token.
        activation: `g`.
        up: `U`, (d, r).
    """

    def __init__(self, size: int, bottleneck: int, tokens: int, orders: tuple[int, int]) -> None:
        super().__init__()
        # Not `nn.Linear`: it would be found as one of the block's linear modules.
        self.down = nn.Parameter(torch.empty(bottleneck, size))
        self.pooler = nn.Parameter(torch.empty(tokens, bottleneck))
        self.activation = RationalActivation(orders)
        self.up = nn.Parameter(torch.empty(size, bottleneck))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the matrices."""
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        # Not zero: equal soft tokens would stay equal.
        nn.init.normal_(self.pooler, std=self.pooler.shape[1] ** -0.5)
        # Small but not zero. The block's norm follows, and its slope at zero is the inverse of its epsilon's root: the
        # first step would move zero soft tokens to full length.
        nn.init.normal_(self.up, std=UP_SPREAD)

    def forward(self, hidden: Tensor, prompt: Tensor) -> Tensor:
        """Returns the soft tokens, (batch, t, d), in the parameters' dtype.

        Args:
            hidden: (batch, tokens, d), in any floating-point dtype.
            prompt: (batch, tokens), bool: the tokens of the prompts, at least one per row.
        """
        outside = ~prompt.unsqueeze(-1)
        # A weight of zero is not enough: values at padding may be NaN, and 0 * NaN is NaN.
        between = functional.linear(hidden.to(self.down.dtype).masked_fill(outside, 0.0), self.down)
        scores = functional.linear(between, self.pooler).float().masked_fill(outside, float("-inf"))
        pooled = torch.einsum("bnt,bnr->btr", scores.softmax(dim=1).to(between.dtype), between)
        return functional.linear(self.activation(pooled).to(self.up.dtype), self.up)
