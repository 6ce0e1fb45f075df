"""The routers' decisions on a set of prompts, and their statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from torch import Tensor, nn

from milora.tuners.milora.router import routers_of

MINIMUM = 1e-6
"""An expert with a probability below this is chosen only because of float32 rounding or its index."""


class Centred(nn.Module):
    """`(h - m) / s`: `m` is the running mean of pooled vectors, `s` the running root mean square of `h - m`."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor | None = None
        self.size: Tensor | None = None

    def forward(self, pooled: Tensor) -> Tensor:
        """Returns (batch, hidden), the activation's input."""
        if self.training or self.mean is None:
            with torch.no_grad():
                mean = pooled.mean(dim=0)
                self.mean = mean if self.mean is None else 0.9 * self.mean + 0.1 * mean
                size = (pooled - self.mean).square().mean().sqrt()
                self.size = size if self.size is None else 0.9 * self.size + 0.1 * size
        assert self.size is not None
        return (pooled - self.mean) / (self.size + 1e-6)


class Recorder:
    """Records the decisions of a MiLoRA model's routers in a `with` block. Records nothing for other models.

    Attributes:
        probabilities: Task -> (rows, blocks, experts).
        chosen: Task -> (rows, blocks, experts), bool.
    """

    def __init__(self, model: Any) -> None:
        self.routers = list(routers_of(model).values())
        self.probabilities: list[Tensor] = []
        self.chosen: list[Tensor] = []
        self._decide = [router.decide for router in self.routers]
        self._decisions: list[list[Any]] = [[] for _ in self.routers]

    def __enter__(self) -> Recorder:
        for router, decide, kept in zip(self.routers, self._decide, self._decisions, strict=True):

            def recording(*args: Any, decide: Any = decide, kept: Any = kept) -> Any:
                kept.append(decide(*args))
                return kept[-1]

            router.decide = recording  # type: ignore[method-assign,assignment]
        return self

    def __exit__(self, *exception: Any) -> None:
        for router, decide in zip(self.routers, self._decide, strict=True):
            router.decide = decide  # type: ignore[method-assign]

    def end_task(self) -> None:
        """Assigns the decisions recorded since the last call to a task."""
        if not self.routers:
            return
        kept = self._decisions
        self.probabilities.append(
            torch.stack([torch.cat([d.probabilities for d in block]) for block in kept], dim=1).cpu()
        )
        self.chosen.append(torch.stack([torch.cat([d.chosen for d in block]) for block in kept], dim=1).cpu())
        for block in kept:
            block.clear()


def route_statistics(
    of_tasks: Sequence[Tensor], chosen_of_tasks: Sequence[Tensor]
) -> dict[str, float | int | list[float]]:
    """Statistics over all prompts of all tasks. The mutual information between task and chosen set is a mean of blocks.

    Args:
        of_tasks: For each task, the probabilities, (rows, blocks, experts).
        chosen_of_tasks: For each task, the chosen experts, (rows, blocks, experts), bool.
    """
    probabilities, chosen = torch.cat(list(of_tasks)), torch.cat(list(chosen_of_tasks))
    rows, blocks, experts = chosen.shape
    task = [index for index, of_task in enumerate(chosen_of_tasks) for _ in of_task]
    # Encodes each chosen set as a number.
    sets = (chosen.long() * 2 ** torch.arange(experts)).sum(dim=-1)
    least = probabilities.masked_fill(~chosen, 2.0).amin(dim=-1)
    entropy = -(probabilities * probabilities.clamp(min=1e-30).log()).sum(dim=-1) / torch.tensor(experts).log()
    share = chosen.float().sum(dim=(0, 1)) / chosen.sum()
    by_task = [of_task.float().mean(dim=0) for of_task in chosen_of_tasks]
    of_blocks = [sets[:, block].tolist() for block in range(blocks)]
    return {
        "prompts": rows,
        "distinct_routes": len({tuple(row) for row in sets.tolist()}),
        "sets_a_block": sum(len(set(of_block)) for of_block in of_blocks) / blocks,
        "normalized_mutual_information": sum(normalized_mutual_info_score(task, b) for b in of_blocks) / blocks,
        "adjusted_mutual_information": sum(adjusted_mutual_info_score(task, b) for b in of_blocks) / blocks,
        "share_difference_by_task": (by_task[0] - by_task[-1]).abs().mean().item(),
        "most_used_share": share.max().item(),
        "shares": share.tolist(),
        "by_ties": (least < MINIMUM).float().mean().item(),
        "entropy": entropy.mean().item(),
    }
