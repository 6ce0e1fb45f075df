"""The vocabulary of a backbone: tokens with embeddings, and tokens that an adapter adds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from milora.backbone.hub_files import adapter_file
from milora_core.errors import MiLoraError

PREFIX = "base_model.model."
"""Prefix of the names in a PEFT file."""


def embedded_tokens(model: Any) -> int | None:
    """The number of a model's input embeddings; `None` if unknown."""
    get = getattr(model, "get_input_embeddings", None)
    weight = getattr(get() if get is not None else None, "weight", None)
    return None if weight is None else int(weight.shape[0])


def check_tokens(model: Any, tokenizer: Any, rows: Iterable[Sequence[int]]) -> None:
    """Checks that a model has an embedding for every token of the rows.

    Raises:
        MiLoraError: If the tokenizer gives a token beyond the model's vocabulary.
    """
    count = embedded_tokens(model)
    if count is None or (len(tokenizer) <= count and max(tokenizer.get_vocab().values(), default=0) < count):
        return
    for tokens in rows:
        largest = max(tokens, default=0)
        if largest >= count:
            raise MiLoraError(
                f"The tokenizer gives {tokenizer.convert_ids_to_tokens(largest)!r} the id {largest}, but the backbone "
                f"has embeddings for only {count} tokens: use the backbone's own tokenizer, or a backbone whose "
                "embeddings were resized and saved."
            )


def padding_within(model: Any, tokenizer: Any) -> None:
    """Sets a padding token that the model has an embedding for: the tokenizer's own, else the end of sequence."""
    count = embedded_tokens(model)
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None and (count is None or token < count):
            if token != tokenizer.pad_token_id:
                tokenizer.pad_token = tokenizer.eos_token
            return
    if tokenizer.pad_token_id is not None:
        # Padding is masked, so any token works.
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)


def fit_embeddings(model: Any, adapters: Mapping[str, str | os.PathLike[str]]) -> None:
    """Resizes a backbone's embeddings to those that an adapter was saved with, before the adapter is loaded.

    PEFT saves embeddings that were resized for added tokens with the adapter, and loads them into the backbone.

    Raises:
        MiLoraError: If there are several adapters and one has embeddings, which would apply to all of them.
    """
    found = {name: rows for name, path in adapters.items() if (rows := _saved_embeddings(model, path)) is not None}
    for name, rows in found.items():
        if rows == embedded_tokens(model):
            continue
        if len(adapters) > 1:
            raise MiLoraError(
                f"The adapter {name!r} has embeddings of {rows} tokens for the whole backbone, which has "
                f"{embedded_tokens(model)}: load it without other adapters."
            )
        model.resize_token_embeddings(rows, mean_resizing=False)


def _saved_embeddings(model: Any, adapter: str | os.PathLike[str]) -> int | None:
    """Rows of the input embeddings in an adapter's file; `None` if it has none."""
    try:
        file = adapter_file(adapter, SAFETENSORS_WEIGHTS_NAME)
        if file is None:
            return None
        module = model.get_input_embeddings()
        key = f"{PREFIX}{next(path for path, each in model.named_modules() if each is module)}.weight"
        with safe_open(file, framework="pt") as tensors:
            return int(tensors.get_slice(key).get_shape()[0]) if key in tensors.keys() else None  # noqa: SIM118
    except (OSError, SafetensorError):
        return None  # the loader says what is wrong with the file
