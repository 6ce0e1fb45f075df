"""Beam search over a request's texts. It follows transformers' rules and gives the texts of `generate(num_beams=n)`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from milora.serving.requests import Sampling

NEVER = -1.0e9
"""transformers' score for continuations that must not be chosen."""


@dataclass(frozen=True)
class Finished:
    """A finished text, or a placeholder until there are enough finished texts.

    Attributes:
        score: The text's log-probability, divided by `length ** length_penalty`.
        tokens: The new tokens, including the last one.
        is_real: Whether the text has ended.
    """

    score: float
    tokens: tuple[int, ...]
    is_real: bool


class BeamSearch:
    """The beam search of one request (`early_stopping=False`).

    Each step selects the best `(e + 1) n` continuations of all beams for `e` tokens that end a text. Of the best `n`,
    those that end become finished texts; the best `n` finished texts are kept. The best `n` continuations that do not
    end are the next beams. The search ends when no beam can exceed the worst of `n` finished texts.

    Args:
        sampling: The request's sampling parameters.
        ends: Tokens that end a text.

    Attributes:
        beams: (log-probability, new tokens) of each beam, best first.
        finished: The best finished texts so far, best first; final once the search has ended.
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
            logits: (beams, vocabulary), float32: the next-token logits of each beam.

        Returns:
            For each of the next beams, the index of the beam that it continues.
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
        # The sort is stable, so equal scores keep their order.
        self.finished = sorted(self.finished, key=lambda each: -each.score)[:width]
        self.beams = [(score, texts[place]) for score, place in zip(best.values.tolist(), chosen, strict=True)]
        worst = min(each.score for each in self.finished)
        possible = self.beams[0][0] / length**penalty
        self._can_improve = self._can_improve and any(
            possible > (worst if each.is_real else NEVER) for each in self.finished
        )
        self.is_over = not self._can_improve or bool(has_ended.all())
        return [beams[place] for place in chosen]
