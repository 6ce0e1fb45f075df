"""Computes routes of prompts in batches, without generating."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from milora.backbone.vocabulary import check_tokens
from milora.inference.generation import batches, encode_prompt, left_padded, padding_token
from milora.tasks.rows import Text
from milora_core.routing import Route


def route_prompts(
    model: Any, tokenizer: Any, prompts: Sequence[Text], batch_size: int = 8, progress: Any = None
) -> Route:
    """The route of each prompt, in the prompts' order, on the CPU.

    Args:
        model: A causal language model with an adapter that has routers.
        tokenizer: The model's.
        prompts: Strings, or lists of chat messages for the tokenizer's chat template.
        batch_size: Maximum number of prompts per batch. A batch has prompts of similar length.
        progress: A `rich` progress bar.

    Raises:
        MiLoraError: If a prompt has no tokens, or one that the model has no embedding for.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    check_tokens(model, tokenizer, encoded)
    plan = batches(encoded, batch_size)
    padding = padding_token(tokenizer)
    parts = [
        model.base_model.route(**left_padded([encoded[index] for index in batch], padding, model.device)).to("cpu")
        for batch in (progress.track(plan, description="routing") if progress else plan)
    ]
    order = [index for batch in plan for index in batch]
    return Route.cat(parts)[sorted(range(len(order)), key=order.__getitem__)]
