"""The inside of a learned adapter's bottleneck, during and after the search."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from milora.tuners.bottleneck import Activation
from milora.tuners.learned_adapter.operations import OPERATIONS
from milora_core.routing.rational import ACTIVATIONS

DROPPED = -1e9
"""The architecture weight of a dropped candidate. Its softmax and its gradient are exactly zero.

It is a value of the weights and not a separate mask, so an adapter saved during the search includes the search's state.
"""


class Cell(nn.Sequential):
    """`operation(activation(z))`, with one activation and one operation."""

    def __init__(self, activation: str, operation: nn.Module) -> None:
        super().__init__()
        self.activation = Activation(activation)
        self.operation = operation


class SearchCell(nn.Module):
    """All candidates at once, weighted by the softmax of learnable architecture weights.

    `y = sum_i softmax(w)_i activation_i(z)`, then `sum_j softmax(v)_j operation_j(y)`.

    Args:
        size: Size r of the bottleneck.
        activations: Names of the activations to choose from.
        operations: Names of the operations to choose from.

    Attributes:
        activation_weights: `w`, (activations).
        operation_weights: `v`, (operations).
    """

    def __init__(self, size: int, activations: list[str], operations: list[str]) -> None:
        super().__init__()
        self.activations = list(activations)
        self.operations = nn.ModuleDict({name: OPERATIONS[name](size) for name in operations})
        self.activation_weights = nn.Parameter(torch.zeros(len(activations)))
        self.operation_weights = nn.Parameter(torch.zeros(len(operations)))

    @property
    def architecture_weights(self) -> list[nn.Parameter]:
        """The architecture weights of both choices."""
        return [self.activation_weights, self.operation_weights]

    @property
    def rounds(self) -> int:
        """Number of calls of [`SearchCell.drop_weakest`] in the whole search; one if there is nothing to drop."""
        return max(*(len(weights) for weights in self.architecture_weights), 2) - 1

    @property
    def rounds_left(self) -> int:
        """Number of remaining calls of [`SearchCell.drop_weakest`] before a [`Cell`] replaces this cell."""
        return max(*(int(_remaining(weights).sum()) for weights in self.architecture_weights), 2) - 1

    @property
    def is_decided(self) -> bool:
        """Whether each choice has one candidate left."""
        return all(_remaining(weights).sum() == 1 for weights in self.architecture_weights)

    @torch.no_grad()
    def drop_weakest(self) -> None:
        """Drops the candidate with the lowest weight (the last one of equals) from each choice with more than one."""
        for weights in self.architecture_weights:
            remaining = _remaining(weights).nonzero()[:, 0].tolist()
            if len(remaining) > 1:
                weights[min(reversed(remaining), key=lambda index: float(weights[index]))] = DROPPED

    def found(self) -> tuple[str, str]:
        """The names of the activation and the operation with the highest weights."""
        activation, operation = (int(weights.argmax()) for weights in self.architecture_weights)
        return self.activations[activation], list(self.operations)[operation]

    def forward(self, z: Tensor) -> Tensor:
        """Maps (..., r) to (..., r)."""
        # Dropped candidates are computed with weight zero: data-parallel training needs a gradient for all parameters.
        y = _mixture(self.activation_weights, [ACTIVATIONS[name](z) for name in self.activations])
        return _mixture(self.operation_weights, [operation(y) for operation in self.operations.values()])


def _mixture(weights: Tensor, outputs: list[Tensor]) -> Tensor:
    shares = weights.softmax(0).to(outputs[0].dtype)
    return torch.einsum("c,c...->...", shares, torch.stack(outputs))


def _remaining(weights: Tensor) -> Tensor:
    return weights > DROPPED / 2
