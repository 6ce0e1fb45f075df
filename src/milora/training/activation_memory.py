"""Whether a training step's activations fit into memory; `milora train` chooses gradient checkpointing by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

SHARE = 0.5
"""Maximum share of the available memory for activations; the rest is for gradients and temporary results."""

_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def activations_fit(model: Any, rows: int, tokens: int, *, bf16: bool) -> bool:
    """Whether a step of `rows` rows of `tokens` tokens fits this machine without gradient checkpointing.

    Args:
        model: A model with its adapter, on a CPU.
        rows: Rows of a batch.
        tokens: Number of tokens of the longest row.
        bf16: Whether the step runs under bf16 autocast.
    """
    one, two = (saved_bytes(model, batch, tokens, bf16=bf16) for batch in (1, 2))
    # Copies of weights are kept once, independent of the batch size.
    return one + (rows - 1) * (two - one) <= SHARE * available_memory()


def saved_bytes(model: Any, rows: int, tokens: int, *, bf16: bool) -> int:
    """Bytes that autograd saves in a forward pass for the backward pass, measured by running one.

    Logits are not counted, because TRL's fused LM head saves none, and neither are dropout's masks.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.arange(rows * tokens).reshape(rows, tokens) % vocabulary
    was_training = model.training
    # Evaluation mode uses no random numbers and does not count as a training step.
    model.eval()
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
    ):
        # The output must exist until the sizes are summed: the address of a freed storage may be reused.
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1)
        total = sum(sizes.values())
        del output
    model.train(was_training)
    return total


def available_memory() -> int:
    """Available bytes for this process: the machine's, or the container's limit if lower."""
    available = psutil.virtual_memory().available
    for limit, usage in _LIMITS:
        try:
            available = min(available, int(limit.read_text()) - int(usage.read_text()))
        except (OSError, ValueError):
            # No such file, or "max".
            continue
    return int(available)
