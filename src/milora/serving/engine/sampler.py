"""Samples tokens from logits: penalties, temperature, `min_p`, `top_k` and `top_p` as in vLLM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from milora.serving.events import TokenLogprob
from milora.serving.requests import Sampling

MOST_SORTED = 1024
"""Number of tokens sorted at first for `min_p`, `top_k` and `top_p`. If they are not enough, all are sorted."""


class Sampler:
    """Samples the tokens of one text.

    Args:
        sampling: The sampling parameters.
        index: Index of the text in its request. Each text has its own random generator.
    """

    def __init__(self, sampling: Sampling, index: int) -> None:
        self.sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed((sampling.seed + index) % 2**63)

    @property
    def is_plain(self) -> bool:
        """Whether the next token is always the argmax of the unchanged logits."""
        return self.sampling.is_greedy and not self._has_penalties

    @property
    def _has_penalties(self) -> bool:
        sampling = self.sampling
        return (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) != (0.0, 0.0, 1.0)

    def draw(self, logits: Tensor, prompt: Sequence[int], text: Sequence[int]) -> int:
        """Samples the next token.

        Args:
            logits: (vocabulary), float32, on the CPU; not changed.
            prompt: The prompt's tokens.
            text: The new tokens so far.
        """
        sampling = self.sampling
        if self._has_penalties:
            logits = penalized(logits, prompt, text, sampling)
        if sampling.is_greedy:
            return int(logits.argmax())
        uniform = float(torch.rand((), generator=self._generator, dtype=torch.float64))
        tokens, probabilities = kept_tokens(logits / sampling.temperature, sampling)
        sums = probabilities.double().cumsum(0)
        place = int(torch.searchsorted(sums, torch.tensor(uniform * float(sums[-1]), dtype=torch.float64), right=True))
        return int(tokens[min(place, len(tokens) - 1)])


def penalized(logits: Tensor, prompt: Sequence[int], text: Sequence[int], sampling: Sampling) -> Tensor:
    """Returns new logits with the penalties of [`Sampling`] for the tokens of the prompt and the text."""
    logits = logits.clone()
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *text}))
        of_seen = logits[seen]
        penalty = sampling.repetition_penalty
        logits[seen] = torch.where(of_seen > 0, of_seen / penalty, of_seen * penalty)
    if text and (sampling.frequency_penalty or sampling.presence_penalty):
        counts = torch.bincount(torch.tensor(text), minlength=len(logits))
        logits -= sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)
    return logits


def kept_tokens(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that remain after `min_p`, `top_k` and `top_p`, applied in this order, and their probabilities.

    Args:
        logits: (vocabulary), divided by the temperature.
        sampling: The sampling parameters.

    Returns:
        Tokens and their probabilities. The probabilities are not renormalized. Both are sorted unless all are kept.
    """
    probabilities = logits.softmax(dim=0)
    size = len(logits)
    if sampling.top_p == 1 and not sampling.top_k and not sampling.min_p:
        return torch.arange(size), probabilities
    most = min(sampling.top_k or size, size)
    for count in sorted({min(most, MOST_SORTED), most}):
        values, tokens = probabilities.topk(count)
        if sampling.min_p:
            least = sampling.min_p * values[0]
            total = float(probabilities[probabilities >= least].sum())
            kept = int((values >= least).sum())
            is_whole = kept < count or count == most
            values, tokens = values[:kept], tokens[:kept]
        else:
            total, is_whole = 1.0, count == most
        if sampling.top_k:
            if not is_whole:
                continue
            total = float(values.sum())
        if sampling.top_p == 1:
            if is_whole:
                return tokens, values
            continue
        # A token is kept if the tokens before it sum to less than top_p.
        before = values.cumsum(0) - values
        kept = int((before < sampling.top_p * total).sum())
        if kept < len(values) or is_whole:
            return tokens[: max(kept, 1)], values[: max(kept, 1)]
    raise AssertionError("All tokens were sorted.")


def token_logprob(logits: Tensor, token: int, count: int) -> TokenLogprob:
    """The log-probabilities of a chosen token and of the most probable tokens, from the unchanged logits.

    Args:
        logits: (vocabulary), float32.
        token: The chosen token.
        count: Number of most probable tokens.
    """
    logprobs = logits.log_softmax(dim=-1)
    values, tokens = logprobs.topk(count)
    return TokenLogprob(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
