"""`MiLoraLM`: lm-eval's Hugging Face model, with prompts routed on the context only.

lm-eval scores a continuation with a forward pass over context and continuation. A router that reads both would see the
scored answer, and the four choices of a question would get four routes. Generation routes on the context, so this model
does too: each row's prompt is its context, for every method that reads the prompt (MiLoRA, IAPT).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from torch import Tensor
from tqdm import tqdm

from milora.backbone.adapter_tokenizer import adapter_tokenizer
from milora.backbone.loading import base_of, load_adapter, locate, revision_of
from milora.backbone.vocabulary import fit_embeddings
from milora_core.errors import MiLoraError

Request: TypeAlias = tuple[tuple[str, str] | None, list[int], list[int]]
"""The strings (lm-eval's cache key), the context's tokens, the continuation's tokens."""

Pass: TypeAlias = tuple[list[int], list[int], list[int]]
"""The indices of the requests that share the pass, their context, and one of their continuations."""

_log = logging.getLogger(__name__)


@register_model("milora")
class MiLoraLM(HFLM):  # type: ignore[misc]
    """A backbone with an adapter of any method, with the arguments of lm-eval's `hf`.

    - Log-likelihoods: the prompt is the context (lm-eval moves spaces at its end to the continuation). Requests with
      the same context that differ only in the last token share a forward pass. Requests with different contexts never
      do, even if the concatenated tokens are equal.
    - Rolling log-likelihoods: the context of a text is lm-eval's prefix token (BOS, else EOS; `prefix_token_id=`), and
      its first window is routed on this token. Further windows of a long text are routed on the token before them.
    - An empty context is replaced by the prefix token.
    - Generation: routed on the prompt, at the prefill.

    Args:
        pretrained: `tiny` (the bundled backbone), a folder, a hub id, or a model; by default the backbone that the
            adapter names.
        peft: The adapter's folder or hub id.
        **arguments: Arguments of lm-eval's `HFLM`: `dtype`, `device`, `batch_size`, `max_length`, `load_in_4bit`, ...

    Raises:
        MiLoraError: If the backbone or the adapter cannot be loaded, or neither is given.
    """

    _model: Any

    def __init__(self, pretrained: Any = None, peft: str | None = None, **arguments: Any) -> None:
        # Reads the adapter first, because a backbone can take minutes to load.
        base = base_of(peft) if peft else None
        pretrained = base if pretrained is None else pretrained
        if pretrained is None:
            raise MiLoraError("Which backbone is meant? Pass --model_args pretrained=BACKBONE, or peft=ADAPTER.")
        if isinstance(pretrained, str):
            if peft:
                # Uses the revision that the adapter was trained on, and the adapter's tokenizer.
                revision = revision_of({"default": peft}, pretrained)
                arguments.setdefault("revision", revision or "main")
                arguments["tokenizer"] = arguments.get("tokenizer") or adapter_tokenizer(peft)
            pretrained = locate(pretrained)
            arguments["device"] = arguments.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
        elif peft:
            raise MiLoraError("A loaded model takes no peft=...: put the adapter on it before.")
        if arguments.pop("backend", "default") not in ("default", "causal"):
            raise MiLoraError("The methods here adapt decoder-only models: leave backend=... out.")
        super().__init__(pretrained=pretrained, peft=peft, backend="causal", **arguments)

    def _create_model(self, pretrained: str, *args: Any, peft: str | None = None, **kwargs: Any) -> None:
        if peft and kwargs.get("delta"):
            raise MiLoraError("Pass either peft=... or delta=..., not both.")
        super()._create_model(pretrained, *args, **kwargs)
        if peft:
            # Our loader has better messages, and HFLM would cut the embeddings to the tokenizer's length.
            fit_embeddings(self._model, {"default": peft})
            self._model = load_adapter(self._model, peft)

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        try:
            super()._get_config(pretrained, **kwargs)
        except (OSError, ValueError) as error:
            raise MiLoraError(
                f"The backbone {pretrained} cannot be loaded: {str(error).splitlines()[0]} A folder works offline."
            ) from error

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation given its context, and whether greedy decoding would give it.

        Args:
            requests: Strings, context and continuation of each request.
            disable_tqdm: Whether to hide the progress bar.
            override_bs: The batch size if `batch_size` is `auto`.
        """
        self._warn_of_cuts(requests)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        # Longest first, so a batch that exceeds the memory fails immediately.
        ordered = Collator(self._passes(requests), sort_fn=lambda each: (-len(each[1]) - len(each[2]), each[1]))
        find_size = None
        if self.batch_size == "auto" and not override_bs:
            self.batch_sizes: dict[Any, int] = {}
            find_size = self._batch_scheduler
        size = (override_bs or 0) if self.batch_size == "auto" else int(self.batch_size)
        progress = tqdm(
            total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests"
        )
        for batch in ordered.get_batched(n=size, batch_fn=find_size):
            for (places, _, continuation), logits in zip(batch, self._continuation_logits(batch), strict=True):
                scores = torch.log_softmax(logits, dim=-1, dtype=self.softmax_dtype or torch.float32)
                wanted = torch.tensor([requests[place][2] for place in places], device=scores.device)
                assert wanted.shape[1] == len(continuation)
                # (requests, tokens)
                of_wanted = scores.expand(len(places), -1, -1).gather(2, wanted[:, :, None])[:, :, 0]
                greedy = (scores.argmax(dim=-1) == wanted).all(dim=1)
                for place, total, is_greedy in zip(places, of_wanted.sum(dim=1).tolist(), greedy.tolist(), strict=True):
                    answers[place] = (total, is_greedy)
                    if requests[place][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[place][0], answers[place])
            progress.update(sum(len(places) for places, _, _ in batch))
        progress.close()
        return answers

    def _passes(self, requests: Sequence[Request]) -> list[Pass]:
        """Groups the requests: one pass for all requests with the same context that differ only in the last token."""
        places: dict[Any, list[int]] = {}
        for place, (_, context, continuation) in enumerate(requests):
            own = None if self.logits_cache else place
            # The key keeps context and continuation separate: equal tokens split elsewhere have another prompt.
            places.setdefault((tuple(context), tuple(continuation[:-1]), own), []).append(place)
        return [(group, requests[group[0]][1], requests[group[0]][2]) for group in places.values()]

    def _continuation_logits(self, batch: Sequence[Pass]) -> list[Tensor]:
        """For each pass, the logits that predict its continuation, (tokens, vocabulary)."""
        # The last token is only predicted, so the model does not read it.
        rows = [(context + continuation)[-(self.max_length + 1) :][:-1] for _, context, continuation in batch]
        length = max(map(len, rows))
        tokens = torch.zeros(len(rows), length, dtype=torch.long)
        prompt = torch.zeros(len(rows), length, dtype=torch.bool)
        for index, (row, (_, _, continuation)) in enumerate(zip(rows, batch, strict=True)):
            tokens[index, : len(row)] = torch.tensor(row)
            prompt[index, : len(row) - len(continuation) + 1] = True
        # A PeftModel forwards the name to its tuner. A tuner without `use_prompt` does not read the prompt. Padding is
        # on the right, after all scored tokens, so no mask is needed.
        use_prompt = getattr(self.model, "use_prompt", None)
        with nullcontext() if use_prompt is None else use_prompt(prompt.to(self.device)):
            logits = self._model_call(tokens.to(self.device))
        # Tokens that PEFT's prompt tuning prepends.
        virtual = logits.shape[1] - length
        ends = [virtual + len(row) for row in rows]
        return [
            logits[index, end - len(continuation) : end]
            for index, (end, (_, _, continuation)) in enumerate(zip(ends, batch, strict=True))
        ]

    def _warn_of_cuts(self, requests: Sequence[Request]) -> None:
        for _, context, continuation in requests:
            if not context or not continuation or len(continuation) > self.max_length:
                raise MiLoraError(
                    f"A request of {len(context)} tokens of context and {len(continuation)} of continuation cannot be "
                    f"scored: it needs one of each at least, and the model reads {self.max_length} tokens."
                )
        cut = sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests)
        if cut:
            _log.warning(
                "%d of %d requests are longer than the model's %d tokens: their contexts are cut on the left.",
                cut,
                len(requests),
                self.max_length,
            )
