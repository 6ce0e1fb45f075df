"""Turns a step's logits into new tokens and events, and ends finished texts."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from milora.serving.engine.beams import BeamSearch
from milora.serving.engine.cache import KeyValueCache
from milora.serving.engine.detokenizer import Detokenizer
from milora.serving.engine.sampler import Sampler, token_logprob
from milora.serving.engine.scheduler import Part, Scheduler
from milora.serving.engine.sequence import Job, Text
from milora.serving.events import TokenEvent, TokenLogprob
from milora.serving.requests import FailedRequestError, NumericalError, ServingError

_log = logging.getLogger(__name__)

Ending = Callable[[Job, ServingError | None], None]
"""Ends a request, with an error or without."""


class Writer:
    """Turns logits into texts. Only the engine's thread may use it.

    Args:
        scheduler: The engine's scheduler.
        cache: The engine's cache.
        ends: The end-of-sequence tokens of the model's generation configuration.
        tokenizer_of: Returns the tokenizer of an adapter, or of the backbone for `None`.
        end: Ends a request.

    Attributes:
        generated: Number of new tokens by tenant.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        cache: KeyValueCache,
        ends: frozenset[int],
        tokenizer_of: Callable[[Any], Any],
        end: Ending,
    ) -> None:
        self._scheduler = scheduler
        self._cache = cache
        self._ends = ends
        self._tokenizer_of = tokenizer_of
        self._end = end
        self.generated: dict[str, int] = defaultdict(int)

    def advance(self, parts: Sequence[Part], logits: Tensor) -> None:
        """Processes the result of a step.

        Args:
            parts: The computed parts.
            logits: (texts, vocabulary): the next-token logits of the parts that complete their texts, in order.
        """
        rows = [part.text for part in parts if part.gives_token]
        for part in parts:
            part.text.computed += part.count
            self._scheduler.remember(part.text)
            self._scheduler.charge(part)
        if not rows:
            return
        most, best = logits.max(dim=-1)
        is_right, likeliest = most.isfinite().tolist(), best.tolist()
        for row, text in enumerate(rows):
            if text.job not in self._scheduler.running:
                continue  # Another text of the request failed, or the request was preempted.
            try:
                if not is_right[row]:
                    raise NumericalError("The model gave NaN or infinity for this request: look at its adapter.")
                self._continue(text, logits[row], likeliest[row])
            except Exception as error:
                self._end(text.job, failed(error))

    def _continue(self, text: Text, logits: Tensor, likeliest: int) -> None:
        """Adds a token to a text, or after the prompt the first token of each text.

        Args:
            text: The text.
            logits: (vocabulary): the next-token logits.
            likeliest: The token with the largest logit.
        """
        job = text.job
        sampling = job.request.sampling
        if sampling.use_beam_search:
            text.logits = logits
            self._search(job)
            return
        for each in self._forked(text):
            assert each.sampler is not None
            token = likeliest
            if not each.sampler.is_plain:
                token = each.sampler.draw(logits, job.request.prompt, each.new_tokens)
            logprobs = None
            if sampling.logprobs is not None:
                logprobs = (token_logprob(logits, token, sampling.logprobs),)
            self._write(each, token, logprobs)

    def _forked(self, text: Text) -> list[Text]:
        """The request's new texts if the prompt was just computed, else `text` alone."""
        job = text.job
        if job.is_forked:
            return [text]
        job.is_forked = True
        sampling = job.request.sampling
        self._branch([text] * sampling.n)
        for each in job.texts:
            each.sampler = Sampler(sampling, each.index)
            each.detokenizer = Detokenizer(
                self._tokenizer_of(job.adapter), sampling.stop, keep_stop=sampling.include_stop_str_in_output
            )
        return list(job.texts)

    def _branch(self, parents: Sequence[Text]) -> None:
        for source, target in self._scheduler.branch(parents):
            self._cache.copy(source, target)

    def _search(self, job: Job) -> None:
        """Runs a step of beam search once the logits of all beams are available."""
        rows = [text.logits for text in job.texts if text.logits is not None]
        if len(rows) < len(job.texts):
            return
        sampling = job.request.sampling
        if job.search is None:
            job.search = BeamSearch(sampling, self._ends_of(job))
        following = job.search.step(torch.stack(rows))
        if not job.search.is_over:
            self._branch([job.texts[beam] for beam in following])
            for text, (_, tokens) in zip(job.texts, job.search.beams, strict=True):
                text.tokens.append(tokens[-1])
            job.is_forked = True
            return
        for index, found in enumerate(job.search.finished):
            self.generated[job.tenant] += len(found.tokens)
            has_ended = found.tokens[-1] in self._ends_of(job)
            shown = found.tokens[:-1] if has_ended else found.tokens
            text = self._tokenizer_of(job.adapter).decode(list(shown), skip_special_tokens=True)
            cause = found.tokens[-1] if found.tokens[-1] in sampling.stop_token_ids else None
            reason = "stop" if has_ended else "length"
            self._send(job, TokenEvent(index, text, found.tokens, None, reason, cause))
        self._end(job, None)

    def _ends_of(self, job: Job) -> frozenset[int]:
        """The tokens that end a request's texts."""
        sampling = job.request.sampling
        if sampling.ignore_eos:
            return frozenset(sampling.stop_token_ids)
        own = self._tokenizer_of(job.adapter).eos_token_id
        return self._ends | {*sampling.stop_token_ids} | ({own} if own is not None else set())

    def _write(self, text: Text, token: int, logprobs: tuple[TokenLogprob] | None) -> None:
        job, sampling, detokenizer = text.job, text.job.request.sampling, text.detokenizer
        assert detokenizer is not None
        text.tokens.append(token)
        self.generated[job.tenant] += 1
        reason: str | None = None
        cause: int | str | None = None
        piece = ""
        if token in self._ends_of(job):
            reason, cause = "stop", token if token in sampling.stop_token_ids else None
        else:
            piece = detokenizer.add(token)
        if reason is None and len(text.new_tokens) >= sampling.max_tokens:
            reason = "length"
        if reason is not None:
            piece += detokenizer.finish()
        if detokenizer.stopped_by is not None:
            reason, cause = "stop", detokenizer.stopped_by
        self._send(job, TokenEvent(text.index, piece, (token,), logprobs, reason, cause))
        if reason is not None:
            self._finish(text)

    @staticmethod
    def _send(job: Job, event: TokenEvent) -> None:
        route = None
        if not job.has_begun:
            job.has_begun = True
            route = job.route.route() if job.route is not None and job.request.return_route else None
        job.generation.put(replace(event, cached_tokens=job.cached_tokens or 0, route=route))

    def _finish(self, text: Text) -> None:
        job = text.job
        job.texts.remove(text)
        job.finished += 1
        self._scheduler.release(text)
        if not job.texts:
            self._end(job, None)


def failed(error: Exception) -> ServingError:
    """The error to report for a request that raised `error`."""
    if isinstance(error, ServingError):
        return error
    _log.error("A request failed.", exc_info=error)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return FailedRequestError(f"The request failed: {lines[0]}")
