"""The candidate operations inside a learned adapter's bottleneck.

Each operation treats every token separately, so prompts and decode steps give the same result with any cache. Each
starts as the identity, so no operation has an advantage before training.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

GROUPS = 8
"""Maximum number of groups of features. A full r x r matrix would add 2 % to an adapter's parameters."""


class Identity(nn.Module):
    """`z`."""

    def __init__(self, size: int) -> None:
        super().__init__()

    def forward(self, z: Tensor) -> Tensor:
        """(..., r) to (..., r)."""
        return z


class Scale(nn.Module):
    """`w * z`, with `w` (r)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Resets the operation to the identity."""
        nn.init.ones_(self.weight)

    def forward(self, z: Tensor) -> Tensor:
        """(..., r) to (..., r)."""
        return self.weight * z


class GroupedLinear(nn.Module):
    """`M z`, with `M` (r, r) block-diagonal: `weight` holds the blocks, (groups, r / groups, r / groups)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        groups = math.gcd(size, GROUPS)
        self.weight = nn.Parameter(torch.empty(groups, size // groups, size // groups))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Resets the weight to zero."""
        nn.init.zeros_(self.weight)

    def forward(self, z: Tensor) -> Tensor:
        """(..., r) to (..., r)."""
        grouped = z.reshape(*z.shape[:-1], *self.weight.shape[:2])  # (..., groups, r / groups)
        return torch.einsum("...gi,goi->...go", grouped, self.weight).flatten(-2)


class Mix(GroupedLinear):
    """`z + M z`: features mix within their group."""

    def forward(self, z: Tensor) -> Tensor:
        """(..., r) to (..., r)."""
        return z + super().forward(z)


class Gate(GroupedLinear):
    """`2 sigmoid(M z) * z`: features gate each other, as in a gated linear unit."""

    def forward(self, z: Tensor) -> Tensor:
        """(..., r) to (..., r)."""
        return 2 * torch.sigmoid(super().forward(z)) * z


OPERATIONS: dict[str, type[nn.Module]] = {"identity": Identity, "scale": Scale, "mix": Mix, "gate": Gate}
"""The operations by name. Each is created with the bottleneck's size."""
