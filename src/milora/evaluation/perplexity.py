"""Perplexity of gold completions: what can be compared on backbones too small to generate them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from milora.backbone.positions import positions_of
from milora.backbone.vocabulary import check_tokens
from milora.evaluation.progress import Watch
from milora.inference.generation import batches, padding_token
from milora.tasks.task import Example
from milora_core.errors import MiLoraError

NO_LABEL = -100
"""Marks tokens that no loss is taken of."""


@dataclass(frozen=True)
class Perplexity:
    """Of some rows' gold completions.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of a completion's token, over all tokens of all rows.
        loss: That mean, in nats.
        rows: The number of rows.
        tokens: How many tokens, each row's end-of-sequence token included.
        no_room: Rows left out, as they have more tokens than the backbone has positions.
    """

    perplexity: float
    loss: float
    rows: int
    tokens: int
    no_room: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def completion_perplexity(
    model: Any, tokenizer: Any, examples: Sequence[Example], *, batch_size: int = 8, progress: Watch | None = None
) -> Perplexity:
    """How well a model predicts the gold completions after their prompts, each with its end-of-sequence token.

    exp(-1/T sum log p(token | prompt, tokens before)) over all T tokens of completions, which is the dev perplexity of
    training. A router reads the prompt alone, as when it generates.

    Args:
        model: A causal language model with an active adapter of any method, or without.
        tokenizer: The model's.
        examples: The rows.
        batch_size: Rows a batch; rows of similar length share one.
        progress: Shows progress.

    Raises:
        MiLoraError: If there is no row that fits the model, one has a token that it has no embedding for, or the GPU
            runs out of memory.
    """
    encoded = [encode_example(tokenizer, example) for example in examples]
    check_tokens(model, tokenizer, [tokens for tokens, _ in encoded])
    positions = positions_of(model)
    fitting = [pair for pair in encoded if positions is None or len(pair[0]) <= positions]
    if not fitting:
        raise MiLoraError(f"None of the {len(examples)} rows fits the backbone's {positions} positions.")
    plan = batches([tokens for tokens, _ in fitting], batch_size)
    losses, count = [], 0
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in progress(plan, "perplexity", len(plan)) if progress else plan:
                inputs = _right_padded([fitting[index] for index in batch], padding_token(tokenizer), model.device)
                try:
                    losses.append(_loss_sum(model, **inputs))
                except torch.OutOfMemoryError as error:
                    raise MiLoraError(
                        f"The GPU's memory does not suffice for a batch of {len(batch)} rows of up to "
                        f"{inputs['input_ids'].shape[1]} tokens: lower the batch size."
                    ) from error
                count += sum(len(fitting[index][0]) - fitting[index][1] for index in batch)
    finally:
        model.train(training)
    mean = float(torch.stack(losses).sum()) / count
    if not math.isfinite(mean):
        raise MiLoraError(f"The model's loss on the gold completions is {mean}: its weights or its dtype overflow.")
    # Beyond, a float holds no exp.
    return Perplexity(math.exp(min(mean, 700.0)), mean, len(fitting), count, len(encoded) - len(fitting))


def encode_example(tokenizer: Any, example: Example) -> tuple[list[int], int]:
    """The tokens of a row as training has them, prompt, completion and end of sequence, and how many are the prompt's.

    As TRL's trainer does, the whole is encoded at once, and the prompt is what the whole and the prompt alone have in
    common from the start.
    """
    end = tokenizer.eos_token or ""
    ending = "" if example.completion.endswith(end) else end
    whole = list(tokenizer(example.prompt + example.completion + ending)["input_ids"])
    prompt = tokenizer(example.prompt)["input_ids"]
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False))
    # The first token has nothing before it to be predicted from.
    return whole, max(1, sum(1 for _ in shared))


def _loss_sum(model: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    # The labels are not given to the model: to a loss of its own methods (AdaLoRA) and backbones (mixtures of experts)
    # add terms of theirs. Methods that read the prompt are told which it is.
    use_prompt = getattr(model, "use_prompt", None)
    prompt = attention_mask.bool() & (labels == NO_LABEL)
    with nullcontext() if use_prompt is None else use_prompt(prompt):
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    of_completions = labels[:, 1:] != NO_LABEL
    chosen = logits[:, :-1][of_completions].float()  # (tokens of completions, vocabulary)
    return functional.cross_entropy(chosen, labels[:, 1:][of_completions], reduction="sum").double()


def _right_padded(
    rows: Sequence[tuple[Sequence[int], int]], padding: int, device: torch.device | str
) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask`, `labels`, each (batch, tokens); padded as in training, so that positions agree."""
    longest = max(len(tokens) for tokens, _ in rows)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for tokens, prompt in rows:
        empty = longest - len(tokens)
        columns["input_ids"].append([*tokens, *[padding] * empty])
        columns["attention_mask"].append([1] * len(tokens) + [0] * empty)
        columns["labels"].append([NO_LABEL] * prompt + [*tokens[prompt:], *[NO_LABEL] * empty])
    return {name: torch.tensor(values, device=device) for name, values in columns.items()}
