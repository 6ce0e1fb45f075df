"""Whether a training step's activations fit the memory, by which `milora train` decides on gradient checkpointing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

SHARE = 0.5
"""The most of the available memory that activations may take; the rest is for gradients and temporary results."""

_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def activations_fit(model: Any, rows: int, tokens: int, *, bf16: bool) -> bool:
    """Whether a step of `rows` rows of `tokens` tokens fits this machine without gradient checkpointing.

    Args:
        model: A model with its adapter, on a CPU.
        rows: Rows of a batch.
        tokens: Tokens of the longest row.
        bf16: Whether the step runs under bf16 autocast.
    """
    one, two = (saved_bytes(model, batch, tokens, bf16=bf16) for batch in (1, 2))
    # Copies of weights are kept once, whatever the batch.
    return one + (rows - 1) * (two - one) <= SHARE * available_memory()


def saved_bytes(model: Any, rows: int, tokens: int, *, bf16: bool) -> int:
    """Bytes that autograd keeps of a forward pass for its backward; measured by running one.

    Logits are not counted, as TRL's fused LM head keeps none, nor dropout's masks.
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
    # In evaluation mode nothing is drawn at random, and nothing counted as a step of training.
    model.eval()
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
    ):
        # The output must live until the sizes are summed: a freed storage's address may be given to another.
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1)
        total = sum(sizes.values())
        del output
    model.train(was_training)
    return total


def available_memory() -> int:
    """Bytes that this process can still have: the machine's, or a container's where that has fewer."""
    available = psutil.virtual_memory().available
    for limit, usage in _LIMITS:
        try:
            available = min(available, int(limit.read_text()) - int(usage.read_text()))
        except (OSError, ValueError):
            # No such file, or "max".
            continue
    return int(available)
