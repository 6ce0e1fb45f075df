"""Sets a run's chat template and end of sequence in the tokenizer that is saved with its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import AutoTokenizer

from milora_core.errors import MiLoraError

TEMPLATE_FILES = (".jinja", ".j2")


def give_template(tokenizer: Any, source: str) -> None:
    """Sets a tokenizer's chat template from a file, or template and end of sequence from another tokenizer.

    TRL would also add the other tokenizer's tokens and resize the embeddings: the new ones would be random, frozen, and
    missing in the backbone when the adapter is loaded.

    Args:
        tokenizer: The backbone's; changed in place.
        source: A `.jinja` or `.j2` file, or a tokenizer's folder or hub id.

    Raises:
        MiLoraError: If there is no such template, it is not valid, or it needs tokens that the tokenizer lacks.
    """
    path = Path(source).expanduser()
    if path.suffix in TEMPLATE_FILES:
        try:
            template, end = path.read_text(encoding="utf-8"), None
        except (OSError, UnicodeDecodeError) as error:
            raise MiLoraError(f"The chat template {source} cannot be read: {error}.") from error
    else:
        template, end = _of_tokenizer(tokenizer, str(path) if path.is_dir() else source)
    before, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateError as error:
        # Other errors come from the template itself for chats that it does not accept; the rows will show them.
        if isinstance(error, TemplateSyntaxError):
            tokenizer.chat_template = before
            raise MiLoraError(
                f"The chat template {source} is not valid: {error.message} (line {error.lineno})."
            ) from error
    if end is not None:
        tokenizer.eos_token = end


def give_end(tokenizer: Any, token: str) -> None:
    """Sets a token of the vocabulary as the end of sequence.

    Raises:
        MiLoraError: If the tokenizer has no such token.
    """
    if token not in tokenizer.get_vocab():
        raise MiLoraError(f"eos_token={token!r} is not a token of the backbone's tokenizer: choose one that it has.")
    tokenizer.eos_token = token


def _of_tokenizer(tokenizer: Any, source: str) -> tuple[str, str | None]:
    """The template of another tokenizer, and its end of sequence."""
    try:
        other = AutoTokenizer.from_pretrained(source)
        template: str = other.get_chat_template()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MiLoraError(
            f"There is no chat template in {source}: {str(error).splitlines()[0]} Give a .jinja file, or a tokenizer "
            "that has one."
        ) from error
    known = tokenizer.get_vocab()
    needed = [token.content for token in other.added_tokens_decoder.values() if token.content in template]
    needed += [other.eos_token] if other.eos_token is not None else []
    missing = [token for token in dict.fromkeys(needed) if token not in known]
    if missing:
        raise MiLoraError(
            f"The chat template of {source} needs {', '.join(missing)}, which the backbone has no embeddings for: give "
            "a template of the backbone's own tokens as a .jinja file, or train a backbone that has them."
        )
    return template, other.eos_token
