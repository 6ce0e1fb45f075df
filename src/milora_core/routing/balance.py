"""The load-balancing loss of a block (equations 4 and 5 of the MiLoRA paper)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def load_balancing_loss(probabilities: Tensor) -> Tensor:
    """The load-balancing loss: how unevenly a router spreads the prompts of a batch over its experts.

    `L = N_mod * sum_i f_i p_i`, with `f_i` the share of prompts whose most probable expert is i (a constant for the
    gradient) and `p_i` the mean probability of expert i. 1 when the load is even, N_mod when one expert takes all.

    Args:
        probabilities: (batch, experts), rows summing to one; ties go to the lowest index.

    Returns:
        A scalar, float32.
    """
    probabilities = probabilities.float()
    experts = probabilities.shape[-1]
    share = functional.one_hot(probabilities.argmax(dim=-1), experts).float().mean(dim=0)
    return experts * (share * probabilities.mean(dim=0)).sum()
