"""The arithmetic of the structure search: which share of each candidate is there, under a budget.

Candidate i has N_i parameters and a gate logit alpha_i. Its probability is the shifted sigmoid
`p_i = sigmoid(alpha_i - zeta)`, where the one scalar zeta is solved so that `sum_i p_i N_i` is the budget (Hu et al.
2022, section 3.3). While it searches, a candidate's output is multiplied by `z_i` in (0, 1), drawn from the
binary-concrete distribution: `z_i = sigmoid((log u - log(1 - u) + alpha_i - zeta) / temperature)`, u uniform.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

REACH = 40.0
"""How far beyond the logits zeta is looked for: there a sigmoid is 0 or 1 to double precision."""


def solve_shift(logits: Tensor, parameters: Tensor, budget: float) -> float:
    """The zeta at which the expected number of parameters is the budget, by bisection.

    Args:
        logits: alpha, (candidates).
        parameters: N, (candidates).
        budget: Parameters to expect; from the sum of N on, every probability is 1.

    Returns:
        zeta.
    """
    alpha, sizes = logits.detach().double().cpu(), parameters.double().cpu()
    low, high = alpha.min().item() - REACH, alpha.max().item() + REACH
    for _ in range(80):
        middle = (low + high) / 2
        # The expectation falls with zeta.
        if (torch.sigmoid(alpha - middle) * sizes).sum().item() > budget:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def shifted(logits: Tensor, parameters: Tensor, budget: float) -> Tensor:
    """The logits of the probabilities, `alpha - zeta`, with a gradient that knows of the budget.

    By the implicit function theorem `d zeta / d alpha_j = N_j p_j (1 - p_j) / sum_i N_i p_i (1 - p_i)`: what makes one
    candidate more probable makes the others less. (S3PET's code holds zeta constant and divides the probabilities by
    their sum, to the same end.)

    Args:
        logits: alpha, (candidates), fp32.
        parameters: N, (candidates).
        budget: Parameters to expect.

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
    """One draw of z for each candidate, (candidates)."""
    # Away from 0 and 1, whose logarithms are infinite.
    u = torch.rand_like(shifted_logits).clamp(1e-6, 1 - 1e-6)
    return torch.sigmoid((u.log() - (-u).log1p() + shifted_logits) / temperature)


def most_probable(probabilities: Sequence[float], parameters: Sequence[int], budget: int) -> list[int]:
    """The most probable candidates that fit the budget, as ascending indices; of equal ones the earlier.

    A candidate that does not fit any more is passed over for the next one that does.
    """
    kept, spent = [], 0
    for index in sorted(range(len(parameters)), key=lambda i: -probabilities[i]):
        if spent + parameters[index] <= budget:
            kept.append(index)
            spent += parameters[index]
    return sorted(kept)
