"""Generates texts from prompts in batches, for the command line and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig

from milora.backbone.positions import positions_of
from milora.backbone.vocabulary import check_tokens
from milora.tasks.rows import Text
from milora_core.errors import MiLoraError
from milora_core.routing import Route


@dataclass(frozen=True)
class Decoding:
    """How texts are generated; by default beam search with 3 beams, as in the paper's tables.

    Args:
        max_new_tokens: Maximum length of a text.
        beams: Width of the beam search; 1 is greedy.
        temperature: Samples at this temperature instead of beam search.
        top_p: Samples from the most probable tokens that together have this probability.

    Raises:
        MiLoraError: If a value is out of range, or beams are combined with sampling.
    """

    max_new_tokens: int = 128
    beams: int = 3
    temperature: float | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise MiLoraError(f"max_new_tokens must be at least 1; found {self.max_new_tokens}.")
        if self.beams < 1:
            raise MiLoraError(f"beams must be at least 1; found {self.beams}.")
        if self.temperature is not None and not self.temperature > 0:
            raise MiLoraError(
                f"temperature must be above 0 (1 beam without a temperature is greedy); found {self.temperature}."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise MiLoraError(f"top_p must lie in (0, 1]; found {self.top_p}.")
        if self.samples and self.beams > 1:
            raise MiLoraError(f"temperature and top_p sample, which needs 1 beam; found beams={self.beams}.")

    @property
    def samples(self) -> bool:
        """Whether tokens are sampled."""
        return self.temperature is not None or self.top_p is not None


@dataclass(frozen=True)
class GeneratedText:
    """The text that a model generated for a prompt.

    Attributes:
        index: The prompt's index in the input.
        text: The generated text without special tokens; it continues the prompt and often begins with a space.
        tokens: Number of generated tokens, including the end-of-sequence token.
        route: The route that served the prompt, one row, on the CPU; `None` for models without routers.
    """

    index: int
    text: str
    tokens: int
    route: Route | None = None


def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    decoding: Decoding | None = None,
    *,
    batch_size: int = 8,
    adapters: Sequence[str] | None = None,
) -> Iterator[GeneratedText]:
    """Continues prompts, in batches of similar length, the longest first.

    Args:
        model: A causal language model with or without adapters; in eval mode while it generates.
        tokenizer: The model's.
        prompts: Strings, or lists of chat messages for the tokenizer's chat template.
        decoding: Decoding settings; [`Decoding`]'s defaults if `None`.
        batch_size: Maximum number of prompts per batch.
        adapters: The adapter of each prompt, if they differ.

    Returns:
        An iterator over the texts as they finish, not in the prompts' order: see [`GeneratedText`]'s `index`. A batch
        is generated when its first text is requested.

    Raises:
        MiLoraError: Before anything is generated, if a prompt has no tokens, has one that the model has no embedding
            for, or exceeds the model's positions with the new tokens, or an adapter does not exist; during generation,
            if the GPU runs out of memory.
    """
    decoding = decoding or Decoding()
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    check_tokens(model, tokenizer, encoded)
    _check_lengths(model, prompts, encoded, decoding.max_new_tokens)
    names = list(adapters) if adapters is not None else [None] * len(encoded)
    unknown = sorted({name for name in names if name is not None and name not in getattr(model, "peft_config", {})})
    if unknown:
        raise MiLoraError(f"There is no adapter {unknown[0]!r}; there are {sorted(getattr(model, 'peft_config', {}))}.")
    return _generate(model, tokenizer, encoded, decoding, batches(encoded, batch_size, names), names)


def encode_prompt(tokenizer: Any, prompt: Text) -> list[int]:
    """The tokens of a prompt as in training, before the completion.

    TRL's trainer uses the common beginning of the prompt and of prompt + completion. So an end-of-sequence token that a
    tokenizer appends to every text is not part of the prompt.

    Raises:
        MiLoraError: If the prompt has no tokens, or is a chat and the tokenizer's chat template is missing or does not
            accept it.
    """
    if isinstance(prompt, str):
        tokens = list(tokenizer(prompt)["input_ids"])
        if tokens and tokens[-1] == tokenizer.eos_token_id:
            bare = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            if not bare or bare[-1] != tokenizer.eos_token_id:
                tokens.pop()
    elif not getattr(tokenizer, "chat_template", None):
        raise MiLoraError("The prompt is a list of messages, and the tokenizer has no chat template: give it as text.")
    else:
        try:
            rendered = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
        except TemplateError as error:
            raise MiLoraError(f"The chat template does not accept the prompt {str(prompt)[:60]}: {error}.") from error
        tokens = list(rendered["input_ids"])
    if not tokens:
        raise MiLoraError(f"The prompt {prompt!r} has no tokens; there is nothing to continue.")
    return tokens


def batches(
    encoded: Sequence[Sequence[int]], batch_size: int, groups: Sequence[str | None] | None = None
) -> list[list[int]]:
    """Indices of prompts, in batches of one group each and of similar length, the longest first.

    This needs little padding, and a batch that exceeds the memory comes first, not after hours.

    Raises:
        MiLoraError: If the batch size is below 1.
    """
    if batch_size < 1:
        raise MiLoraError(f"batch_size must be at least 1; found {batch_size}.")
    groups = groups if groups is not None else [None] * len(encoded)
    result = []
    for group in dict.fromkeys(groups):
        indices = [index for index, of_index in enumerate(groups) if of_index == group]
        indices.sort(key=lambda index: -len(encoded[index]))
        result += [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    return result


def left_padded(encoded: Sequence[Sequence[int]], padding: int, device: torch.device | str) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, both (batch, tokens), of prompts that end in the same column."""
    longest = max(len(tokens) for tokens in encoded)
    return {
        "input_ids": torch.tensor([[padding] * (longest - len(ids)) + list(ids) for ids in encoded], device=device),
        "attention_mask": torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in encoded], device=device),
    }


def padding_token(tokenizer: Any) -> int:
    """The padding token; any token if the tokenizer has none, because it is masked."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def _generate(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[Sequence[int]],
    decoding: Decoding,
    plan: list[list[int]],
    names: Sequence[str | None],
) -> Iterator[GeneratedText]:
    padding = padding_token(tokenizer)
    ends = _end_tokens(model, tokenizer)
    settings = _generation_config(decoding, padding, ends)
    training = model.training
    before = getattr(model, "active_adapter", None)
    model.eval()
    try:
        for batch in plan:
            name = names[batch[0]]
            if name is not None and name != model.active_adapter:
                model.set_adapter(name)
            inputs = left_padded([encoded[index] for index in batch], padding, model.device)
            try:
                with _recorded_routes(model) as routes:
                    output = model.generate(**inputs, generation_config=settings)
            except torch.OutOfMemoryError as error:
                raise MiLoraError(
                    f"The GPU's memory is too small for a batch of {len(batch)} prompts of up to "
                    f"{inputs['input_ids'].shape[1]} tokens with {decoding.beams} beams: lower the batch size."
                ) from error
            # Beams of a prompt share its route.
            route = routes[0][:: len(routes[0]) // len(batch)].to("cpu") if routes else None
            for place, written in enumerate(output[:, inputs["input_ids"].shape[1] :].tolist()):
                tokens = _until_end(written, ends)
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                yield GeneratedText(batch[place], text, len(tokens), None if route is None else route[place])
    finally:
        model.train(training)
        if any(name is not None for name in names) and model.active_adapter != before:
            model.set_adapter(before)


def _recorded_routes(model: Any) -> AbstractContextManager[list[Route]]:
    record = getattr(model, "record_routes", None)
    return nullcontext([]) if record is None else record()


def _generation_config(decoding: Decoding, padding: int, ends: list[int]) -> GenerationConfig:
    # New settings: a backbone's own ones (sampling, penalties) are for chat, not for this request.
    sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p} if decoding.samples else {}
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        num_beams=decoding.beams,
        do_sample=decoding.samples,
        pad_token_id=padding,
        eos_token_id=ends or None,
        **{name: value for name, value in sampling.items() if value is not None},
    )


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: the backbone's, and the tokenizer's, which training appends to completions."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = list(own) if isinstance(own, list | tuple) else [own]
    return sorted({token for token in [*ends, tokenizer.eos_token_id] if token is not None})


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    for position, token in enumerate(tokens):
        if token in ends:
            return tokens[: position + 1]
    return tokens


def _check_lengths(model: Any, prompts: Sequence[Text], encoded: Sequence[Sequence[int]], new_tokens: int) -> None:
    positions = positions_of(model)
    if positions is None:
        return
    for prompt, tokens in zip(prompts, encoded, strict=True):
        if len(tokens) + new_tokens > positions:
            raise MiLoraError(
                f"The prompt {str(prompt)[:40]!r} has {len(tokens)} tokens, which with {new_tokens} new tokens exceeds "
                f"the backbone's {positions} positions: shorten it, or lower the number of new tokens."
            )
