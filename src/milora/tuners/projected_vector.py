"""Vectors learned as projections of shorter ones, for BitFit, (IA)3 and P-tuning v2."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

DIRECT_SPREAD = 0.02
"""Initial standard deviation of several directly learned vectors: equal vectors would stay equal."""


class ProjectedVector(nn.Module):
    """`v = seed W`, with `seed` (projection_dim) and `W` (projection_dim, size); or `v` learned directly.

    `W` starts at zero and the seed at random, so `v` starts at zero and has a gradient. A single directly learned
    vector starts at zero, several start close to zero.

    Args:
        size: Length of the vector.
        projection_dim: Length of the seed, or `None` for a directly learned vector.
        count: Number of vectors that share the projection, as a shape; `()` for a single vector.

    Attributes:
        seed: (*count, projection_dim), or (*count, size) without a projection.
        projection: `W` transposed, (size, projection_dim), or `None`.
    """

    def __init__(self, size: int, projection_dim: int | None, count: tuple[int, ...] = ()) -> None:
        super().__init__()
        if projection_dim is None:
            self.seed = nn.Parameter(DIRECT_SPREAD * torch.randn(*count, size) if count else torch.zeros(size))
        else:
            self.seed = nn.Parameter(torch.randn(*count, projection_dim))
        self.projection = None if projection_dim is None else nn.Parameter(torch.zeros(size, projection_dim))
        self._kept: tuple[tuple[object, ...], Tensor] | None = None

    def forward(self) -> Tensor:
        """Returns the vectors, (*count, size). Without gradients they are cached until a parameter changes."""
        if self.projection is None:
            return self.seed
        if torch.is_grad_enabled():
            return functional.linear(self.seed, self.projection)
        state = tuple((p.data_ptr(), p._version, p.device, p.dtype) for p in (self.seed, self.projection))
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, functional.linear(self.seed, self.projection).detach())
        return self._kept[1]

    def train(self, mode: bool = True) -> ProjectedVector:
        """Like `nn.Module.train`, and clears the cached vectors."""
        self._kept = None
        return super().train(mode)
