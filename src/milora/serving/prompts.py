"""Tokenizes prompts like `milora generate`: with each adapter's own tokenizer and chat template."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from milora.backbone.adapter_tokenizer import adapter_tokenizer
from milora.backbone.vocabulary import embedded_tokens
from milora.inference.generation import encode_prompt
from milora_core.errors import MiLoraError

MOST_TOKENIZERS = 32
"""Maximum number of different tokenizers in memory. A vocabulary takes tens of megabytes."""

_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


class TokenizerFiles(NamedTuple):
    """The tokenizer's files in an adapter's folder."""

    digest: str
    folder: Path


class Prompts:
    """Tokenizes prompts. Use it in one thread at a time, as the library's tokenizers are not thread-safe.

    Adapters with equal tokenizer files share one tokenizer.

    Args:
        model: The backbone.
        tokenizer: The backbone's tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._vocabulary = embedded_tokens(model)
        self._own = tokenizer
        self._of_adapter: dict[str, TokenizerFiles | None] = {}
        self._loaded: OrderedDict[str, Any] = OrderedDict()

    def add(self, name: str, folder: Path) -> None:
        """Loads an adapter's tokenizer and uses it for the adapter's prompts.

        Raises:
            MiLoraError: If its files cannot be read.
        """
        self.set(name, self.load(folder))

    def load(self, folder: Path) -> TokenizerFiles | None:
        """Loads the tokenizer of an adapter's folder; returns `None` for a folder without one.

        Raises:
            MiLoraError: If its files cannot be read.
        """
        digest = _digest(folder)
        files = None if digest is None else TokenizerFiles(digest, folder)
        self._loaded_from(files)
        return files

    def set(self, name: str, files: TokenizerFiles | None) -> None:
        """Uses a loaded tokenizer for an adapter's prompts; `None` for the backbone's."""
        self._of_adapter[name] = files

    def remove(self, name: str) -> None:
        """Removes an adapter's tokenizer."""
        self._of_adapter.pop(name, None)

    def tokenizer(self, adapter: str | None) -> Any:
        """The tokenizer of an adapter; the backbone's for `None` and for adapters without a tokenizer."""
        return self._loaded_from(None if adapter is None else self._of_adapter.get(adapter))

    def _loaded_from(self, files: TokenizerFiles | None) -> Any:
        if files is None:
            return self._own
        digest, folder = files
        if digest not in self._loaded:
            self._loaded[digest] = adapter_tokenizer(folder) or self._own
            if len(self._loaded) > MOST_TOKENIZERS:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(digest)
        return self._loaded[digest]

    def encode(self, adapter: str | None, prompt: str | Sequence[int] | Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """The token ids of a prompt.

        Args:
            adapter: The adapter whose tokenizer is used; `None` for the backbone's.
            prompt: A text, token ids, or chat messages.

        Raises:
            MiLoraError: If the prompt has no tokens or a token without an embedding in the backbone, or the chat
                template does not accept it.
        """
        if isinstance(prompt, str) or isinstance(prompt[0], Mapping):
            tokens = tuple(self._encode(adapter, prompt))
        else:
            tokens = tuple(prompt)  # type: ignore[arg-type]
        largest = max(tokens)
        if self._vocabulary is not None and largest >= self._vocabulary:
            raise MiLoraError(
                f"The prompt has the token {largest}; the backbone has embeddings for {self._vocabulary} tokens."
            )
        return tokens

    def _encode(self, adapter: str | None, prompt: Any) -> list[int]:
        try:
            return encode_prompt(self.tokenizer(adapter), prompt)
        except MiLoraError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            # A chat template is a program and may raise any error.
            raise MiLoraError(f"The chat template does not accept these messages ({type(error).__name__}).") from error


def _digest(folder: Path) -> str | None:
    """A digest of the tokenizer files of a folder; `None` if there are none."""
    found = [folder / name for name in _FILES if (folder / name).is_file()]
    if not found:
        return None
    digest = hashlib.sha256()
    for path in found:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
