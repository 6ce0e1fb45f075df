"""A character tokenizer for the tiny random models: ids 1 to 95 are characters, 0 pads, 96 ends."""

import string
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from support.architectures import ARCHITECTURES, PAD, VOCABULARY

CHARACTERS = [
    character for character in f"{string.ascii_letters}{string.digits}{string.punctuation} \n" if character != "`"
]
END = VOCABULARY - 1
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def character_tokenizer(*, chat: bool = False, appends_end: bool = False, pads: bool = True) -> PreTrainedTokenizerFast:
    """The tokenizer; options add a chat template, append an end token to every text, or remove the padding token."""
    vocabulary = {"<pad>": PAD, **{character: 1 + index for index, character in enumerate(CHARACTERS)}, "<eos>": END}
    assert len(vocabulary) == VOCABULARY
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if appends_end:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", END)])
    special: dict[str, Any] = {"pad_token": "<pad>"} if pads else {}
    result = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", **special)
    if chat:
        result.chat_template = CHAT_TEMPLATE
    return result


def save_backbone(folder: Path, family: str = "llama", positions: int | None = None, **settings: Any) -> Path:
    """Saves a tiny random model and its tokenizer in a folder that `from_pretrained` reads.

    `positions` overrides the number of positions, for models without position weights.
    """
    model = ARCHITECTURES[family]()
    if positions is not None:
        model.config.max_position_embeddings = positions
    model.save_pretrained(folder)
    character_tokenizer(**settings).save_pretrained(folder)
    return folder
