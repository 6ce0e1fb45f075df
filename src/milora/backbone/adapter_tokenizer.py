"""The tokenizer of an adapter: its chat template, added tokens and end of sequence."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from milora.backbone.hub_files import adapter_file
from milora_core.errors import MiLoraError

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


def adapter_tokenizer(adapter: str | os.PathLike[str]) -> Any | None:
    """The tokenizer saved with an adapter, as trainers save it; `None` if there is none.

    Args:
        adapter: The adapter's folder or hub id.

    Raises:
        MiLoraError: If its files cannot be read.
    """
    folder = Path(adapter).expanduser()
    try:
        if all(adapter_file(adapter, name) is None for name in TOKENIZER_FILES):
            return None
        return AutoTokenizer.from_pretrained(folder if folder.is_dir() else os.fspath(adapter))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MiLoraError(f"The tokenizer of {adapter} cannot be loaded: {str(error).splitlines()[0]}") from error


def only_tokenizer(tokenizers: Mapping[str, Any]) -> Any:
    """The tokenizer of several adapters on one model.

    Args:
        tokenizers: By name, each adapter's own tokenizer, or the backbone's if it has none.

    Raises:
        MiLoraError: If two of them give different tokens for the same prompt, or end texts differently.
    """
    (first, tokenizer), *others = tokenizers.items()
    for name, other in others:
        if found := difference(tokenizer, other):
            raise MiLoraError(
                f"The adapters {first!r} and {name!r} have different tokenizers ({found}), but one model uses one "
                "tokenizer: load them separately."
            )
    return tokenizer


def difference(tokenizer: Any, other: Any) -> str:
    """Differences of two tokenizers that affect prompts and ends of texts; empty if there are none."""
    if tokenizer is other:
        return ""
    for attribute, words in (
        ("chat_template", "the chat template"),
        ("eos_token_id", "the end of sequence"),
        ("bos_token_id", "the beginning of sequence"),
    ):
        if getattr(tokenizer, attribute, None) != getattr(other, attribute, None):
            return words
    if tokenizer.get_vocab() != other.get_vocab():
        return "the vocabulary"
    # Only a trial shows whether special tokens are added around a text.
    return "" if tokenizer("a")["input_ids"] == other("a")["input_ids"] else "the special tokens around a text"


def add_end(model: Any, tokenizer: Any) -> None:
    """Adds the tokenizer's end of sequence to the tokens that end the model's texts."""
    config = getattr(model, "generation_config", None)
    end = tokenizer.eos_token_id
    if config is None or end is None:
        return
    own = config.eos_token_id
    ends = [] if own is None else list(own) if isinstance(own, list | tuple) else [own]
    if end not in ends:
        config.eos_token_id = [*ends, end] if ends else end
