"""Finds the prompt's tokens of a forward pass from the arguments of a Hugging Face model."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from milora.tuners.trainers import check_calling_trainer
from milora_core.errors import MiLoraError

IGNORED_LABEL = -100

PACKING_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")
"""What collators without padding pass to say where the sequences of a row begin."""

PACKED = (
    "Several prompts are packed into one row ({evidence}), but each row has exactly one route: disable packing and "
    "padding-free batches (packing=False, padding_free=False) and use padding."
)


def attended_tokens(arguments: Mapping[str, Any]) -> Tensor:
    """(batch, tokens), bool: the tokens that are not padding.

    Args:
        arguments: The model's arguments by name: `input_ids` or `inputs_embeds`, and `attention_mask` as (batch,
            tokens), as the four-dimensional mask that generation with a static cache prepares, or as a mapping of such
            masks by kind of layer. Without a mask every token is attended.

    Raises:
        MiLoraError: If there are no tokens, a row is padding only, or several prompts are packed into one row.
    """
    source = arguments.get("input_ids")
    if source is None:
        source = arguments.get("inputs_embeds")
    if not isinstance(source, Tensor) or source.dim() < 2:
        raise MiLoraError("A route needs input_ids (batch, tokens) or inputs_embeds (batch, tokens, hidden).")
    batch, tokens = source.shape[:2]
    if tokens == 0 or batch == 0:
        raise MiLoraError(f"A route needs a prompt of at least one token; found a batch of shape ({batch}, {tokens}).")
    attended = _from_mask(arguments.get("attention_mask"), batch, tokens, source.device)
    empty = ~attended.any(dim=1)
    if empty.any():
        rows = empty.nonzero()[:, 0].tolist()
        raise MiLoraError(f"Every token of row(s) {rows} is masked; a prompt needs at least one attended token.")
    _refuse_packing(arguments, attended)
    return attended


def predicts_next_tokens(model: nn.Module) -> bool:
    """Whether a model's labels are next tokens, as a causal language model's are.

    The labels of sequence, token or multiple-choice classification are classes, and mark no end of a prompt.
    """
    can_generate = getattr(model, "can_generate", None)
    return can_generate is None or bool(can_generate())


def prompt_of_call(model: nn.Module, attended: Tensor, labels: Tensor | None, *, shifted: bool = False) -> Tensor:
    """(batch, tokens), bool: the prompts of a forward pass without `use_prompt`.

    A classifier's prompt is the whole row. A language model's is read off its labels by [`prompt_tokens`].

    Args:
        model: The backbone.
        attended: As of [`prompt_tokens`].
        labels: As of [`prompt_tokens`]; of a classifier, in any shape.
        shifted: As of [`prompt_tokens`].

    Raises:
        MiLoraError: If a trainer makes the pass and withholds the labels, or packs several prompts into a row.
    """
    if not predicts_next_tokens(model):
        return attended
    if not torch.compiler.is_dynamo_compiling():
        check_calling_trainer(has_labels=labels is not None)
    return prompt_tokens(attended, labels, shifted=shifted)


def prompt_tokens(attended: Tensor, labels: Tensor | None, *, shifted: bool = False) -> Tensor:
    """(batch, tokens), bool: every attended token before the first supervised label.

    So training and evaluation with labels route on the same tokens as generation. A row without a supervised label is
    all prompt; of a row whose every token is supervised the first attended token is the prompt, with a warning.

    Args:
        attended: (batch, tokens), bool.
        labels: (batch, tokens), -100 where there is nothing to learn, or `None`.
        shifted: Whether the label at position t is that of token t + 1.
    """
    if labels is None:
        return attended
    supervised = (labels != IGNORED_LABEL).to(attended.device)
    if shifted:
        supervised = torch.cat([torch.zeros_like(supervised[:, :1]), supervised[:, :-1]], dim=1)
    started = (supervised & attended).cumsum(dim=1) > 0
    prompt = attended & ~started
    missing = ~prompt.any(dim=1)
    if missing.any():
        warnings.warn(
            "Every token of a row is supervised, so its first token counts as the prompt. Mask the prompt's labels "
            "with -100, or train on prompt and completion with completion_only_loss.",
            stacklevel=2,
        )
        first = (attended.cumsum(dim=1) == 1) & attended
        prompt = torch.where(missing[:, None], first, prompt)
    return prompt


def supervised_tokens(labels: Tensor, *, shifted: bool = False) -> Tensor:
    """How many predictions the loss averages over, as `Trainer` counts them.

    Args:
        labels: (batch, tokens), -100 where there is nothing to learn; or a classifier's, in any shape.
        shifted: Whether every label counts: a language model's own labels are shifted by one, and the first has no
            token that predicts it.
    """
    return ((labels if shifted else labels[:, 1:]) != IGNORED_LABEL).sum()


def _from_mask(mask: Any, batch: int, tokens: int, device: torch.device) -> Tensor:
    if isinstance(mask, Mapping):
        # Windowed layers see a part of the prompt only, but every token sees itself in each of them.
        mask = next((kind for kind in (mask.get("full_attention"), *mask.values()) if kind is not None), None)
    if mask is None:
        return torch.ones(batch, tokens, dtype=torch.bool, device=device)
    if mask.dim() == 4:
        # (batch, 1, queries, keys): a token is attended if it may look at itself. Additive masks hold 0 there.
        diagonal: Tensor = mask[:, 0].diagonal(dim1=1, dim2=2)[:, :tokens]
        attended = diagonal if diagonal.dtype == torch.bool else diagonal == 0
        return attended.expand(batch, tokens)
    if mask.dim() == 2 and mask.shape[1] >= tokens:
        return torch.as_tensor(mask[:, -tokens:], device=device, dtype=torch.bool)
    raise MiLoraError(
        f"attention_mask must be (batch, tokens) = ({batch}, {tokens}) for a prompt; found {tuple(mask.shape)}."
    )


def _refuse_packing(arguments: Mapping[str, Any], attended: Tensor) -> None:
    for name in PACKING_ARGUMENTS:
        if arguments.get(name) is not None:
            raise MiLoraError(PACKED.format(evidence=f"{name} was passed"))
    positions = arguments.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] == attended.shape[1] > 1:
        both = attended[:, 1:] & attended[:, :-1]
        if (both & (positions[:, 1:] <= positions[:, :-1])).any():
            raise MiLoraError(PACKED.format(evidence="position_ids start again in the middle of a row"))


def arguments_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    if not args:
        return kwargs
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


def labels_of(arguments: Mapping[str, Any]) -> tuple[Tensor | None, bool]:
    """The labels of a call, and whether they are already shifted to the token that predicts them."""
    shifted = arguments.get("shift_labels")
    return (arguments.get("labels"), False) if shifted is None else (shifted, True)
