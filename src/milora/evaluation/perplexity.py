"""Perplexity of gold completions, a measure that also works on backbones too small to generate answers."""

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
"""The label of tokens that the loss ignores."""


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of gold completions.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per completion token, over all tokens of all rows.
        loss: That mean, in nats.
        rows: Number of rows.
        tokens: Number of tokens, including each row's end-of-sequence token.
        no_room: Number of rows left out because they have more tokens than the backbone has positions.
    """

    perplexity: float
    loss: float
    rows: int
    tokens: int
    no_room: int

    def to_dict(self) -> dict[str, Any]:
        """The perplexity for JSON."""
        return asdict(self)


def completion_perplexity(
    model: Any, tokenizer: Any, examples: Sequence[Example], *, batch_size: int = 8, progress: Watch | None = None
) -> Perplexity:
    """Measures a model's perplexity on gold completions after their prompts, including the end-of-sequence tokens.

    exp(-1/T sum log p(token | prompt, tokens before)) over all T completion tokens. This equals the dev perplexity of
    training. A router reads only the prompt, as in generation.

    Args:
        model: A causal language model, with or without an active adapter of any method.
        tokenizer: The model's tokenizer.
        examples: The rows.
        batch_size: Rows per batch. A batch has rows of similar length.
        progress: Shows progress.

    Raises:
        MiLoraError: If no row fits the model, a row has a token without an embedding, or the GPU runs out of memory.
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
    # exp overflows a float above about 709.
    return Perplexity(math.exp(min(mean, 700.0)), mean, len(fitting), count, len(encoded) - len(fitting))


def encode_example(tokenizer: Any, example: Example) -> tuple[list[int], int]:
    """The tokens of a row (prompt, completion and end of sequence), as in training, and the number of prompt tokens.

    Like TRL's trainer, this encodes the whole text at once. The prompt tokens are the longest common prefix of the
    whole text's tokens and the prompt's tokens.
    """
    end = tokenizer.eos_token or ""
    ending = "" if example.completion.endswith(end) else end
    whole = list(tokenizer(example.prompt + example.completion + ending)["input_ids"])
    prompt = tokenizer(example.prompt)["input_ids"]
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False))
    # The first token cannot be predicted, so it always counts as prompt.
    return whole, max(1, sum(1 for _ in shared))


def _loss_sum(model: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    # The labels are not passed to the model, because some methods (AdaLoRA) and backbones (mixtures of experts) add
    # terms to its loss. Methods with a router get the prompt's mask.
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
    """`input_ids`, `attention_mask` and `labels`, each `(batch, tokens)`, right-padded as in training."""
    longest = max(len(tokens) for tokens, _ in rows)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for tokens, prompt in rows:
        empty = longest - len(tokens)
        columns["input_ids"].append([*tokens, *[padding] * empty])
        columns["attention_mask"].append([1] * len(tokens) + [0] * empty)
        columns["labels"].append([NO_LABEL] * prompt + [*tokens[prompt:], *[NO_LABEL] * empty])
    return {name: torch.tensor(values, device=device) for name, values in columns.items()}
