"""The only file that changes TRL's fused LM head: on a CPU too, it scores only supervised positions."""

from __future__ import annotations

import torch
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

CHOICE = "_use_triton"
"""The function with which `trl.trainer.utils` decides per device whether to skip unsupervised positions."""


def score_supervised_positions_only() -> None:
    """Makes TRL's fused LM head project only positions with a label on CPUs, as it does on GPUs.

    On other devices TRL projects every position, because a varying number of supervised positions would recompile a
    compiled model. Nothing is compiled on a CPU, and with a vocabulary of 49,152 words and three supervised tokens in a
    row of 114 the unused logits cost a third of a training step. Losses and gradients do not change.
    """
    setattr(trl_utils, CHOICE, _leaves_out_unsupervised)


def _leaves_out_unsupervised(device: torch.device) -> bool:
    return device.type == "cpu" or bool(chunked_logprob._use_triton(device))
