"""A vector that is learned as the projection of a shorter one: what BitFit and (IA)3 add or multiply by."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ProjectedVector(nn.Module):
    """`v = seed W`, with `seed` (projection_dim) and `W` (projection_dim, size); or `v` itself, zero at the start.

    `W` starts at zero and the seed at random, so that `v` starts at zero and has a gradient.

    Args:
        size: Length of the vector.
        projection_dim: Length of the seed, or `None` for a vector that is learned directly.

    Attributes:
        seed: (projection_dim), or (size) without a projection.
        projection: `W` transposed, (size, projection_dim), or `None`.
    """

    def __init__(self, size: int, projection_dim: int | None) -> None:
        super().__init__()
        self.seed = nn.Parameter(torch.zeros(size) if projection_dim is None else torch.randn(projection_dim))
        self.projection = None if projection_dim is None else nn.Parameter(torch.zeros(size, projection_dim))
        self._kept: tuple[tuple[object, ...], Tensor] | None = None

    def forward(self) -> Tensor:
        """The vector, (size). Without gradients it is computed once, until a parameter changes."""
        if self.projection is None:
            return self.seed
        if torch.is_grad_enabled():
            return self.projection @ self.seed
        state = tuple((p.data_ptr(), p._version, p.device, p.dtype) for p in (self.seed, self.projection))
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, (self.projection @ self.seed).detach())
        return self._kept[1]

    def train(self, mode: bool = True) -> ProjectedVector:
        """As a module's; what was kept is dropped."""
        self._kept = None
        return super().train(mode)
