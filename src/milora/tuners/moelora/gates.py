"""The weights of a module's experts: from a router for each token, or from the task of each row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from milora_core.errors import MiLoraError


def top_gates(logits: Tensor, top_k: int) -> Tensor:
    """The softmax over the k highest of the logits, (..., experts); other experts have weight zero.

    It equals `p_i / sum of the kept p`, with `p` the softmax over all logits. This is the usual gate of mixtures of
    experts (Shazeer et al. 2017, Mixtral); the MiLoRA paper does not specify it. A tie goes to the lowest index.
    """
    if top_k == logits.shape[-1]:
        return logits.softmax(dim=-1)
    # A stable sort keeps equal values in order; torch.topk does not specify which of them it returns.
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(logits).scatter(-1, order[..., :top_k], values[..., :top_k].softmax(dim=-1))


def for_input(gates: Tensor, leading: torch.Size, path: str) -> Tensor:
    """Reshapes gates of another module's tokens, (..., experts), to this module's, (*leading, experts).

    `leading` is the shape of this module's input without the features: (batch, tokens) or (batch * tokens).

    Raises:
        MiLoraError: If the other module had a different number of tokens.
    """
    tokens = gates.shape[:-1]
    if tokens.numel() != leading.numel():
        raise MiLoraError(
            f"{path} was given {tuple(leading)} tokens, the module that its router reads {tuple(tokens)}, so gates "
            "cannot be matched to tokens. Exclude this module from target_modules."
        )
    return gates.reshape(*leading, gates.shape[-1])


def for_rows(gates: Tensor, leading: torch.Size, path: str) -> Tensor:
    """Expands the gates of a batch's rows, (batch, experts), so that they can be broadcast to (*leading, experts).

    Raises:
        MiLoraError: If the input's first dimension is not the batch.
    """
    rows, experts = gates.shape
    if leading[0] == rows:
        return gates.reshape(rows, *[1] * (len(leading) - 1), experts)
    if len(leading) == 1 and leading[0] % rows == 0:
        return gates.repeat_interleave(leading[0] // rows, dim=0)
    raise MiLoraError(
        f"{path} was given an input of {tuple(leading)} tokens for a batch of {rows} rows, so tokens cannot be matched"
        " to rows. Exclude this module from target_modules."
    )


class TaskGate(nn.Module):
    """`g = softmax(W_T e_j)` with the embedding `e_j` of task j; every expert has a weight (Liu et al. 2023).

    `embedding.weight` is (tasks, size), `projection.weight` is `W_T`, (experts, size).
    """

    def __init__(self, tasks: int, size: int, experts: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tasks, size)
        self.projection = nn.Linear(size, experts, bias=False)

    def forward(self, tasks: Tensor) -> Tensor:
        """Maps task numbers (batch) to gates (batch, experts), float32."""
        logits: Tensor = self.projection(self.embedding(tasks.to(self.embedding.weight.device)))
        return logits.float().softmax(dim=-1)
