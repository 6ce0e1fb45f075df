"""Beam search over a request's texts, with transformers' rules, so the texts are those of `generate(num_beams=n)`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from milora.serving.requests import Sampling

NEVER = -1.0e9
"""transformers' score for what must not be chosen."""


@dataclass(frozen=True)
class Finished:
    """A text that has ended, or one that only fills a place until enough have.

    Attributes:
        score: Its log-probability, divided by its length to the power of the length penalty.
        tokens: Its new tokens, the last one included.
        is_real: Whether it has ended.
    """

    score: float
    tokens: tuple[int, ...]
    is_real: bool


class BeamSearch:
    """The search of one request (`early_stopping=False`).

    Each step takes the best `(e + 1) n` continuations of all beams, `e` being the number of tokens that end a text.
    Those of the best `n` that end are finished texts, of which the best `n` are kept; the best `n` that do not end are
    the next beams. The search ends when the best beam cannot overtake the worst of `n` finished texts.

    Args:
        sampling: The request's.
        ends: Tokens that end a text.

    Attributes:
        beams: (log-probability, new tokens) of each beam, the best first.
        finished: The best finished texts so far, the best first; complete when the search is over.
        is_over: Whether the search has ended.
    """

    def __init__(self, sampling: Sampling, ends: frozenset[int]) -> None:
        self._sampling = sampling
        self._ends = ends
        self._can_improve = True
        self.beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        self.finished = [Finished(NEVER, (), is_real=False)] * sampling.n
        self.is_over = False

    def step(self, logits: Tensor) -> list[int]:
        """One step of the search.

        Args:
            logits: (beams, vocabulary), float32, behind each beam.

        Returns:
            For each of the next beams, which beam it continues.
        """
        width, penalty = self._sampling.n, self._sampling.length_penalty
        scores = logits.log_softmax(dim=-1) + torch.tensor([score for score, _ in self.beams])[:, None]
        count = min(max(2, 1 + len(self._ends)) * width, scores.numel())
        values, places = scores.flatten().topk(count)
        beams, tokens = (places // logits.shape[1]).tolist(), (places % logits.shape[1]).tolist()
        texts = [(*self.beams[beam][1], token) for beam, token in zip(beams, tokens, strict=True)]
        length = len(texts[0])
        has_ended = torch.tensor([token in self._ends or length >= self._sampling.max_tokens for token in tokens])
        following = values + has_ended.float() * NEVER
        best = following.topk(min(width, count))
        chosen = best.indices.tolist()
        normalized = values / length**penalty
        if not self._can_improve:
            normalized = normalized + NEVER
        for rank, (score, text) in enumerate(zip(normalized.tolist(), texts, strict=True)):
            is_real = bool(has_ended[rank]) and rank < width
            self.finished.append(Finished(score if is_real else score + NEVER, text, is_real))
        # A stable sort, as equal scores keep their order.
        self.finished = sorted(self.finished, key=lambda each: -each.score)[:width]
        self.beams = [(score, texts[place]) for score, place in zip(best.values.tolist(), chosen, strict=True)]
        worst = min(each.score for each in self.finished)
        possible = self.beams[0][0] / length**penalty
        self._can_improve = self._can_improve and any(
            possible > (worst if each.is_real else NEVER) for each in self.finished
        )
        self.is_over = not self._can_improve or bool(has_ended.all())
        return [beams[place] for place in chosen]
