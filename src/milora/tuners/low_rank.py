"""The low-rank map that LoRA adds to the output of a linear module."""

from __future__ import annotations

import math

from torch import Tensor, nn


class LowRank(nn.Module):
    """`(lora_alpha / r) x A B`, initially zero (Hu et al. 2021).

    `A` is initialised as in PEFT (uniform, by fan-in), `B` to zero.

    Args:
        in_features: Size of `x`.
        out_features: Size of the result.
        r: Rank.
        lora_alpha: Numerator of the scale.

    Attributes:
        lora_A: `A` transposed, (r, in_features).
        lora_B: `B` transposed, (out_features, r).
    """

    def __init__(self, in_features: int, out_features: int, r: int, lora_alpha: float) -> None:
        super().__init__()
        self.scaling = lora_alpha / r
        self.lora_A = nn.Linear(in_features, r, bias=False)
        self.lora_B = nn.Linear(r, out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features), in the dtype of the weights."""
        narrow: Tensor = self.lora_A(hidden.to(self.lora_A.weight.dtype))
        wide: Tensor = self.lora_B(narrow)
        return wide * self.scaling
