"""The formulas of the structure search: probabilities and gates of the candidates under a budget.

Candidate i has N_i parameters and a gate logit alpha_i. Its probability is the shifted sigmoid
`p_i = sigmoid(alpha_i - zeta)`. The scalar zeta is solved so that `sum_i p_i N_i` equals the budget (Hu et al. 2022,
section 3.3). During the search, a candidate's output is multiplied by `z_i` in (0, 1), sampled from the binary-concrete
distribution: `z_i = sigmoid((log u - log(1 - u) + alpha_i - zeta) / temperature)`, u uniform.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

REACH = 40.0
"""Search range of zeta beyond the logits. At this distance a sigmoid is 0 or 1 in double precision."""


def solve_shift(logits: Tensor, parameters: Tensor, budget: float) -> float:
    """Finds the zeta at which the expected number of parameters equals the budget, by bisection.

    Args:
        logits: alpha, (candidates).
        parameters: N, (candidates).
        budget: Expected number of parameters. If it is at least the sum of N, every probability is 1.

    Returns:
        zeta.
    """
    alpha, sizes = logits.detach().double().cpu(), parameters.double().cpu()
    low, high = alpha.min().item() - REACH, alpha.max().item() + REACH
    for _ in range(80):
        middle = (low + high) / 2
        # The expectation decreases with zeta.
        if (torch.sigmoid(alpha - middle) * sizes).sum().item() > budget:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def shifted(logits: Tensor, parameters: Tensor, budget: float) -> Tensor:
    """Returns the logits of the probabilities, `alpha - zeta`, with a gradient that accounts for the budget.

    By the implicit function theorem, `d zeta / d alpha_j = N_j p_j (1 - p_j) / sum_i N_i p_i (1 - p_i)`. A change that
    makes one candidate more probable makes the others less probable. (S3PET's code keeps zeta constant and divides the
    probabilities by their sum for the same purpose.)

    Args:
        logits: alpha, (candidates), fp32.
        parameters: N, (candidates).
        budget: Expected number of parameters.

    Returns:
        (candidates).
    """
    plain = logits.detach() - solve_shift(logits, parameters, budget)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return plain
    p = torch.sigmoid(plain)
    weights = parameters.to(plain) * p * (1 - p)
    weights = weights / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)
    moved = logits - logits.detach()
    return plain + (moved - (weights * moved).sum())


def sample_gates(shifted_logits: Tensor, temperature: float) -> Tensor:
    """Samples z for each candidate, (candidates)."""
    # Excludes 0 and 1, where the logarithms are infinite.
    u = torch.rand_like(shifted_logits).clamp(1e-6, 1 - 1e-6)
    return torch.sigmoid((u.log() - (-u).log1p() + shifted_logits) / temperature)


def most_probable(probabilities: Sequence[float], parameters: Sequence[int], budget: int) -> list[int]:
    """The most probable candidates that fit the budget, as ascending indices. A tie goes to the lower index.

    A candidate that no longer fits is skipped, and the next one that fits is kept.
    """
    kept, spent = [], 0
    for index in sorted(range(len(parameters)), key=lambda i: -probabilities[i]):
        if spent + parameters[index] <= budget:
            kept.append(index)
            spent += parameters[index]
    return sorted(kept)
