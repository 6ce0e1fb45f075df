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
"""Arguments in which padding-free collators pass the sequence boundaries of a row."""

PACKED = (
    "Several prompts are packed into one row ({evidence}), but each row has exactly one route: disable packing and "
    "padding-free batches (packing=False, padding_free=False) and use padding."
)


def attended_tokens(arguments: Mapping[str, Any]) -> Tensor:
    """(batch, tokens), bool: the tokens that are not padding.

    Args:
        arguments: The model's arguments by name: `input_ids` or `inputs_embeds`, and `attention_mask`. The mask has
            shape (batch, tokens), or is the four-dimensional mask that generation with a static cache prepares, or a
            mapping from kind of layer to such a mask. Without a mask every token is attended.

    Raises:
        MiLoraError: If there are no tokens, a row has only padding, or several prompts are packed into one row.
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
    """Whether a model's labels are next tokens, as in a causal language model.

    In sequence, token or multiple-choice classification, labels are classes and do not mark the end of a prompt.
    """
    can_generate = getattr(model, "can_generate", None)
    return can_generate is None or bool(can_generate())


def prompt_of_call(model: nn.Module, attended: Tensor, labels: Tensor | None, *, shifted: bool = False) -> Tensor:
    """(batch, tokens), bool: the prompts of a forward pass without `use_prompt`.

    The prompt of a classifier is the whole row. For a language model, [`prompt_tokens`] finds it from the labels.

    Args:
        model: The backbone.
        attended: See [`prompt_tokens`].
        labels: See [`prompt_tokens`]; a classifier's labels may have any shape.
        shifted: See [`prompt_tokens`].

    Raises:
        MiLoraError: If a trainer calls the model without the labels, or packs several prompts into a row.
    """
    if not predicts_next_tokens(model):
        return attended
    if not torch.compiler.is_dynamo_compiling():
        check_calling_trainer(has_labels=labels is not None)
    return prompt_tokens(attended, labels, shifted=shifted)


def prompt_tokens(attended: Tensor, labels: Tensor | None, *, shifted: bool = False) -> Tensor:
    """(batch, tokens), bool: every attended token before the first supervised label.

    Training and evaluation with labels then route on the same tokens as generation. A row without supervised labels is
    all prompt. If every token of a row is supervised, its first attended token is the prompt and a warning is given.

    Args:
        attended: (batch, tokens), bool.
        labels: (batch, tokens), -100 for ignored positions, or `None`.
        shifted: Whether the label at position t belongs to token t + 1.
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
    """Number of predictions that the loss averages over, as `Trainer` counts them.

    Args:
        labels: (batch, tokens), -100 for ignored positions; a classifier's labels may have any shape.
        shifted: Whether every label counts. A language model shifts unshifted labels by one, so no token predicts the
            first of them.
    """
    return ((labels if shifted else labels[:, 1:]) != IGNORED_LABEL).sum()


def _from_mask(mask: Any, batch: int, tokens: int, device: torch.device) -> Tensor:
    if isinstance(mask, Mapping):
        # Layers with a window see only a part of the prompt, but every token sees itself in every layer.
        mask = next((kind for kind in (mask.get("full_attention"), *mask.values()) if kind is not None), None)
    if mask is None:
        return torch.ones(batch, tokens, dtype=torch.bool, device=device)
    if mask.dim() == 4:
        # (batch, 1, queries, keys): a token that is not padding attends to itself. Additive masks are 0 there.
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
    """The labels of a call, and whether each is already at the position of the token that predicts it."""
    shifted = arguments.get("shift_labels")
    return (arguments.get("labels"), False) if shifted is None else (shifted, True)
